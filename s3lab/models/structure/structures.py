"""The parts of a decoder layer that go together, by name, and couplings on the matrices of each layer.

A coupled spec names tensors; in a decoder layer each of its names is a glob over the names of the matrices, whole or
by their end: ``down_proj`` is ``model.layers.3.mlp.down_proj`` in the fourth.  Texts of ready couplings go by the name
of what they prune:

===================  ====================================================================================
``mlp-channels``     columns of the second matrix of an MLP, with the rows before it that feed them
``attention-heads``  the columns that a head has in the output projection, with its rows of the queries
``kv-groups``        the heads that share keys and values, with their rows of queries, keys and values
===================  ====================================================================================

"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Pattern
from s3lab.errors import SpecError
from s3lab.models.structure.decoder import Matrix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The couplings of a name, of which the first that fits counts: {head} stands for the rows of a head, {group} for those
# of all heads that share one head of keys and values.  The last two are of matrices that hold queries, keys and values.
STRUCTURES: dict[str, tuple[str, ...]] = {
    "mlp-channels": (
        "down_proj: (M,1) & gate_proj: (1,K) follows & up_proj: (1,K) follows",
        "fc2: (M,1) & fc1: (1,K) follows",
        "mlp.c_proj: (M,1) & mlp.c_fc: (1,K) follows",
        "dense_4h_to_h: (M,1) & dense_h_to_4h: (1,K) follows",
    ),
    "attention-heads": (
        "o_proj: (M,{head}) & q_proj: ({head},K) follows",
        "out_proj: (M,{head}) & q_proj: ({head},K) follows",
        "dense: (M,{head}) & q_proj: ({head},K) follows",
        "attn.c_proj: (M,{head}) & c_attn: (3,M/3,K):(K*M/3,K,1) / (3,{head},K) follows",
        "attention.dense: (M,{head}) & query_key_value: (3*{head},K) follows",
    ),
    "kv-groups": (
        "o_proj: (M,{group}) & q_proj: ({group},K) follows & k_proj: ({head},K) follows & v_proj: ({head},K) follows",
        "out_proj: (M,{group}) & q_proj: ({group},K) follows & k_proj: ({head},K) follows & v_proj: ({head},K) follows",
        "dense: (M,{group}) & q_proj: ({group},K) follows & k_proj: ({head},K) follows & v_proj: ({head},K) follows",
        "attn.c_proj: (M,{head}) & c_attn: (3,M/3,K):(K*M/3,K,1) / (3,{head},K) follows",
        "attention.dense: (M,{head}) & query_key_value: (3*{head},K) follows",
    ),
}


def head_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Return the rows of a ``head``, and those of a ``group`` of heads that share keys and values.

    Raises SpecError for a model without attention heads.

    >>> from transformers import LlamaConfig
    >>> head_sizes(LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    {'head': 16, 'group': 32}
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise SpecError(f"{type(text).__name__} tells of no attention heads: couple the matrices by a text of your own")
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return {"head": head, "group": head * heads // (getattr(text, "num_key_value_heads", None) or heads)}


def read_couplings(spec: str | Pattern, config: PretrainedConfig) -> tuple[Coupled, ...]:
    """Return the couplings that a spec stands for on a model of this config, none if it is for one matrix alone.

    ``spec`` is a pattern, its text, or a name of `STRUCTURES` with a budget; one coupling per kind of architecture.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    >>> str(read_couplings("attention-heads keep 3", config)[0])
    'o_proj: (M,16) & q_proj: (16,K) follows keep 3'
    >>> read_couplings("2:4", config)
    ()
    """
    if isinstance(spec, Pattern):
        return (spec,) if isinstance(spec, Coupled) else ()
    name, _, budget = (part.strip() for part in spec.partition(" keep "))
    if name in STRUCTURES:
        if not budget:
            raise SpecError(f"{name} has no budget: say how many are kept, as in '{name} keep 75%'")
        texts = [text.format(**head_sizes(config)) if "{" in text else text for text in STRUCTURES[name]]
        return tuple(found for text in texts if isinstance(found := parse(f"{text} keep {budget}"), Coupled))
    try:
        found = parse(spec)
    except SpecError as error:
        if close := get_close_matches(name, STRUCTURES):
            raise SpecError(f"{error}\n    parts of a layer of a similar name: {', '.join(close)}") from None
        raise
    return (found,) if isinstance(found, Coupled) else ()


def fit(couplings: Iterable[Coupled], matrices: Mapping[str, Matrix], layer: str) -> tuple[Coupled, dict[str, Matrix]]:
    """Return the first coupling whose names all match one matrix of the layer, and the matrices by those names.

    ``matrices`` go by full name, of which ``layer`` is the beginning.  Raises SpecError where none fits, or its blocks
    do not fit these matrices, naming what there is.
    """
    local = {name.removeprefix(f"{layer}."): matrix for name, matrix in matrices.items()}
    reasons = []
    for coupling in couplings:
        found = {name: [own for own in local if fnmatchcase(f".{own}", f"*.{name}")] for name in coupling.names}
        if wrong := {name: own for name, own in found.items() if len(own) != 1}:
            told = [f"{name} is {' and '.join(own) or 'missing'}" for name, own in wrong.items()]
            reasons.append(f"for {' & '.join(found)}, {', '.join(told)}")
            continue
        members = {name: local[own] for name, (own,) in found.items()}
        if len({matrix.name for matrix in members.values()}) < len(members):
            raise SpecError(f"{layer}: of {', '.join(found)} in {coupling}, two are the same matrix: name each once")
        try:
            coupling.bind({name: (m.weight.shape[0], m.weight.shape[1]) for name, m in members.items()})
        except SpecError as error:
            raise SpecError(f"{layer}: {error}") from error
        return coupling, members
    raise SpecError(f"{layer} cannot be coupled so: {'; '.join(reasons)}; there are {', '.join(local)} to couple")
