"""Training under any pattern: linear layers that are sparse while they are trained, and real zeros at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Pattern
from s3lab.errors import SolveError, SpecError
from s3lab.training.base import Method, SparseWeight, Unit
from s3lab.training.fixed import Fixed
from s3lab.training.gradual import Gradual
from s3lab.training.lora import LoRA
from s3lab.training.proximal import Proximal
from s3lab.training.rigl import RigL
from s3lab.training.s2ft import S2FT
from s3lab.training.sparsity import Sparsity
from s3lab.training.spp import SPP
from s3lab.training.srste import SRSTE
from s3lab.training.ste import STE
from s3lab.wildcards import assign

METHODS: dict[str, type[Method]] = {
    "fixed": Fixed,
    "ste": STE,
    "srste": SRSTE,
    "gradual": Gradual,
    "rigl": RigL,
    "proximal": Proximal,
    "spp": SPP,
    "lora": LoRA,
    "s2ft": S2FT,
}
DENSE = "dense"
One = str | Pattern


def make_method(method: str | Method) -> Method:
    """Return the method of a name, with its default options, or the method itself; SolveError for an unknown name."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise SolveError(
            f"no training method is called {method!r}: use one of {', '.join(METHODS)}, or a Method such as "
            "SRSTE(decay=1e-4)"
        )
    return METHODS[method]()


def sparse(
    module: nn.Module,
    spec: One | Mapping[str, One],
    method: str | Method = "srste",
    layers: str | Sequence[str] = "*",
    *,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Sparsity:
    """Let the linear layers of a module be trained under a pattern, and return what takes the steps.

    From now on the forward pass of each layer sees a weight that satisfies the pattern; what is trained is its
    ``parametrizations.weight.original``, the same Parameter as before, or, with `SPP`, `LoRA` and `S2FT`, new ones
    beside it: for those, make the optimiser afterwards.  `densify` takes it back.

    ``layers`` are globs over the dotted names of linear layers.  ``spec`` is a pattern for all of them, or a table of
    globs, of which the first that matches decides, and "dense" leaves a layer alone.  A coupling takes the layers that
    it names, of those that its glob decides, and leaves the others dense.  ``masks``, bool (M, K) by the dotted name of
    the layer, are what a method begins with, in place of its own choice; ``seed`` is of what it draws.

    Raises SpecError, and changes nothing, for a spec that does not fit, a mask that is missing or breaks its pattern, a
    layer that is sparse already, shares its weight with something else, or is frozen where the method needs its
    gradient, each by name; SolveError for an unknown method.

    >>> import s3lab as s3
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> sparsity = s3.sparse(model, {"0": "2:4", "*": "dense"}, "ste")
    >>> (model[0].weight != 0).sum(1).tolist()
    [4, 4, 4, 4, 4, 4, 4, 4]
    >>> s3.densify(model)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    chosen = make_method(method)
    generator = torch.Generator().manual_seed(seed)
    units = _make_units(module, spec, [layers] if isinstance(layers, str) else list(layers))
    for name, layer in ((name, layer) for unit in units for name, layer in unit.layers.items()):
        _expect_fit(module, name, layer, chosen)
    begun = [chosen.begin(unit, generator) if masks is None else _take(unit, masks) for unit in units]
    for unit, own in zip(units, begun, strict=True):
        for name, layer in unit.layers.items():
            unit.sparse[name] = weight = SparseWeight(chosen, own[name], layer.weight.requires_grad)
            chosen.equip(weight, layer.weight, generator)
            layer.weight.requires_grad_(weight.trained and not chosen.freezes)
            parametrize.register_parametrization(layer, "weight", weight)
    return Sparsity(chosen, units)


def densify(module: nn.Module) -> nn.Module:
    """Give all layers of a module that `sparse` changed plain weights, with real zeros, and return the module.

    The Parameters are those of before, so that an optimiser may go on, and take gradients as they did.  Raises
    SpecError where no layer is sparse.

    >>> import s3lab as s3
    >>> layer = nn.Linear(4, 1)
    >>> sparsity = s3.sparse(layer, "1:4", "fixed")
    >>> s3.densify(layer).weight.count_nonzero().item()
    1
    """
    found = [layer for layer in module.modules() if _find_own(layer)]
    if not found:
        raise SpecError(f"no layer of this {type(module).__name__} is sparse: nothing is to be made dense")
    for layer in found:
        own = _find_own(layer)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        layer.weight.requires_grad_(own is not None and own.trained)  # pyright: ignore[reportCallIssue]
    return module


def _make_units(module: nn.Module, spec: One | Mapping[str, One], globs: list[str]) -> list[Unit]:
    """The patterns and the layers that each decides on."""
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    if unused := [glob for glob in globs if not any(fnmatchcase(name, glob) for name in linears)]:
        raise SpecError(f"no linear layer is called {unused[0]!r}; there are {', '.join(linears) or 'none'}")
    names = [name for name in linears if any(fnmatchcase(name, glob) for glob in globs)]
    table = dict(spec) if isinstance(spec, Mapping) else {"*": spec}
    decided = assign(names, {glob: glob for glob in table})
    units = []
    for glob, one in table.items():
        if one == DENSE:
            continue
        pattern, own = parse(one) if isinstance(one, str) else one, [n for n in names if decided[n] == glob]
        if not isinstance(pattern, Coupled):
            units += [Unit(pattern, {name: linears[name]}) for name in own]
        elif missing := [name for name in pattern.names if name not in own]:
            raise SpecError(f"{pattern} couples {', '.join(missing)}, not among the layers: {', '.join(own)}")
        else:
            units.append(Unit(pattern, {name: linears[name] for name in pattern.names}))
    if not units:
        raise SpecError("all layers are to stay dense: give a spec for some of them")
    return units


def _take(unit: Unit, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of the layers of a unit, as they were given."""
    if missing := [name for name in unit.layers if name not in masks]:
        raise SpecError(f"no mask is given for {', '.join(missing)}: give one for each layer, or none at all")
    own = {name: masks[name].to(W.device, torch.bool, copy=True) for name, W in unit.weights.items()}
    unit.check(own)
    return own


def _expect_fit(module: nn.Module, name: str, layer: nn.Linear, method: Method) -> None:
    """Raise SpecError unless the weight of a layer can be made sparse."""
    if parametrize.is_parametrized(layer, "weight"):
        raise SpecError(f"{name or 'the layer'} is parametrised already: densify it first, or leave it 'dense'")
    for other, part in module.named_modules():
        for key, tensor in part.named_parameters(recurse=False):
            if tensor is layer.weight and part is not layer:
                raise SpecError(
                    f"{name} shares its weight with {other}.{key}, which would stay dense: leave it 'dense', or give "
                    "it a weight of its own"
                )
    if method.needs_gradient and not layer.weight.requires_grad:
        raise SpecError(
            f"{name or 'the layer'} is frozen, and {method} trains its weight: unfreeze it, leave it 'dense', or use "
            "Fixed()"
        )


def _find_own(layer: nn.Module) -> SparseWeight | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((p for p in layer.parametrizations["weight"] if isinstance(p, SparseWeight)), None)  # pyright: ignore
