"""What is read off a model is what its code does: layers, matrices, shared inputs, and which come after which."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from s3lab.errors import DataError, SpecError
from s3lab.models.structure.decoder import Matrix, Watch, find_course, find_decoder
from s3lab.wildcards import assign

pytest.importorskip("transformers")

# Written down from the papers' diagrams: stages by /, groups that share an input by commas.
ATTENTION_MLP = "self_attn.q_proj,k_proj,v_proj / self_attn.o_proj / mlp.gate_proj,up_proj / mlp.down_proj"
LAYERS = {
    **dict.fromkeys(("Qwen3", "Qwen2", "Llama", "Mistral", "Gemma"), ATTENTION_MLP),
    "OPT": "self_attn.k_proj,v_proj,q_proj / self_attn.out_proj / fc1 / fc2",
    "GPT2": "attn.c_attn / attn.c_proj / mlp.c_fc / mlp.c_proj",
    "GPTNeoX": "attention.query_key_value + mlp.dense_h_to_4h / attention.dense + mlp.dense_4h_to_h",
    "Phi": "self_attn.q_proj,k_proj,v_proj,fc1 / self_attn.dense + mlp.fc2",
    "Qwen3Moe": "self_attn.q_proj,k_proj,v_proj / self_attn.o_proj / "
    + " + ".join(f"gate_up_proj.{expert}" for expert in range(4))
    + " / "
    + " + ".join(f"down_proj.{expert}" for expert in range(4)),
}


def last(name):
    return name.rpartition(".")[2]


def read(stages):
    """The last words of the names, as sets in sets in a list."""
    return [frozenset(frozenset(last(m.name) for m in group) for group in stage.groups) for stage in stages]


def expected(text):
    return [
        frozenset(frozenset(last(name.strip()) for name in group.split(",")) for group in stage.split(" + "))
        for stage in text.split(" / ")
    ]


def stages_of(model, index=0):
    decoder = find_decoder(model)
    found = {}

    def keep(layer, args, kwargs):
        found["call"] = args, kwargs

    hook = decoder.layers[index].register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(3, 64, (3, 16), generator=torch.Generator().manual_seed(0)), use_cache=False)
    hook.remove()
    (hidden, *args), kwargs = found["call"]
    hidden = hidden.detach().requires_grad_()
    layer = decoder.layers[index]
    return find_course(decoder.matrices[index], lambda: layer(hidden, *args, **kwargs), tokens=48).stages


def test_layers_are_found_by_what_they_hold(make_tiny, family):
    decoder = find_decoder(make_tiny(family))
    assert len(decoder.layers) == len(decoder.matrices) == 2
    assert all(name.startswith(f"{decoder.name}.1.") for name in decoder.matrices[1])


def test_stages_follow_the_flow_of_each_family(make_tiny, family):
    model = make_tiny(family)
    if family == "Qwen3Moe":
        model.set_experts_implementation("eager")
    for index in range(2):
        stages = stages_of(model, index)
        assert read(stages) == expected(LAYERS[family])
        assert [stage.once for stage in stages] == [
            not any(matrix.expert is not None for group in stage.groups for matrix in group) for stage in stages
        ]


def test_a_matrix_is_outputs_by_inputs_whatever_way_its_module_keeps_it(make_tiny, family):
    model = make_tiny(family)
    if family == "Qwen3Moe":
        model.set_experts_implementation("eager")
    decoder, seen = find_decoder(model), set()

    def check(matrix, x, out):
        seen.add(matrix.name)
        bias = getattr(matrix.module, "bias", None)
        torch.testing.assert_close(out, functional.linear(x, matrix.weight, bias), atol=1e-5, rtol=1e-4)

    named = {name: matrix for matrices in decoder.matrices for name, matrix in matrices.items()}
    with torch.no_grad(), Watch(named, check):
        model(torch.randint(3, 64, (3, 16), generator=torch.Generator().manual_seed(0)), use_cache=False)
    assert seen == named.keys()


def test_what_is_written_into_a_weight_is_in_the_model(make_tiny, family):
    model = make_tiny(family)
    for matrices in find_decoder(model).matrices:
        for matrix in matrices.values():
            matrix.weight.zero_()
            parameter = getattr(matrix.module, matrix.parameter)
            assert not (parameter if matrix.expert is None else parameter[matrix.expert]).any()


class Routed(nn.Module):
    """Two experts as modules of their own, of which the second is never asked."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.after = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.after(self.first(x[:2]))


def test_what_is_never_met_comes_last_and_what_sees_some_tokens_is_not_met_once():
    module = Routed()
    matrices = {name: Matrix(name, part) for name, part in module.named_children()}
    stages = find_course(matrices, lambda: module(torch.ones(3, 4, requires_grad=True)), tokens=3).stages
    assert read(stages) == expected("first / after / second")
    assert not any(stage.once for stage in stages)


def test_an_input_changed_in_place_between_two_products_is_not_shared():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward():
        x = torch.ones(3, 4, requires_grad=True) * 2
        first(x)
        x.add_(1)
        second(x)

    matrices = {"first": Matrix("first", first), "second": Matrix("second", second)}
    (stage,) = find_course(matrices, forward, tokens=3).stages
    assert read([stage]) == expected("first + second")


def test_a_model_without_layers_is_refused():
    with pytest.raises(DataError, match="Linear has no list of repeated layers"):
        find_decoder(nn.Linear(2, 2))


NAMES = ["model.layers.0.mlp.up", "model.layers.0.attn.o", "model.layers.1.mlp.up", "model.layers.1.attn.o"]


def test_the_first_glob_wins():
    table = {"layers.0.*": "a", "*.mlp.*": "b", "model.layers.1.attn.o": "c"}
    assert list(assign(NAMES, table, root="model.").values()) == ["a", "a", "b", "c"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"*.mlp.*": "2:4"}, r"no glob of \*.mlp.\* matches 'model.layers.0.attn.o', 'model.layers.1.attn.o': add one"),
        ({"*": "2:4", "*.mlp.*": "1:4"}, r"'\*.mlp.\*' decides no matrix"),
        ({"*.mpl.*": "2:4", "*": "1:4"}, r"'\*.mpl.\*' decides no matrix: the names are 'model.layers.0.mlp.up'"),
    ],
)
def test_globs_that_leave_a_name_or_do_nothing_are_errors(table, message):
    with pytest.raises(SpecError, match=message):
        assign(NAMES, table, root="model.")
