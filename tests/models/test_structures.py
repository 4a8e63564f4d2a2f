"""Coupled specs find their matrices in each layer, are solved on what leads, and leave runs as they were."""

import pytest
import torch

import s3lab
from s3lab.errors import SpecError
from s3lab.models.prune.jobs import read_tables
from s3lab.models.prune.sequential import prune_model
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.structure.structures import STRUCTURES, head_sizes, read_couplings

transformers = pytest.importorskip("transformers")

QUIET = {"progress": False, "batch": 4}
CHANNELS, GROUPS, HEADS = "mlp-channels keep 75%", "kv-groups keep 1", "attention-heads keep 3"
LEADERS = {
    "Qwen3": ("mlp.down_proj", "self_attn.o_proj"),
    "Llama": ("mlp.down_proj", "self_attn.o_proj"),
    "OPT": ("fc2", "self_attn.out_proj"),
    "GPT2": ("mlp.c_proj", "attn.c_proj"),
    "GPTNeoX": ("mlp.dense_4h_to_h", "attention.dense"),
    "Phi": ("mlp.fc2", "self_attn.dense"),
}
FOLLOWERS = {
    "Qwen3": (["mlp.gate_proj", "mlp.up_proj"], ["self_attn.q_proj"], ["self_attn.k_proj", "self_attn.v_proj"]),
    "Llama": (["mlp.gate_proj", "mlp.up_proj"], ["self_attn.q_proj"], ["self_attn.k_proj", "self_attn.v_proj"]),
    "OPT": (["fc1"], ["self_attn.q_proj"], ["self_attn.k_proj", "self_attn.v_proj"]),
    "Phi": (["mlp.fc1"], ["self_attn.q_proj"], ["self_attn.k_proj", "self_attn.v_proj"]),
}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def matrices(model):
    return {name: m.weight for layer in find_decoder(model).matrices for name, m in layer.items()}


def of_layer(model, index):
    decoder = find_decoder(model)
    return {name.removeprefix(f"{decoder.name}.{index}."): m.weight for name, m in decoder.matrices[index].items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def untimed(rows):
    return [{key: value for key, value in row.items() if key not in ("time_s", "mem_mib")} for row in rows]


def kept_columns(W, width, keep):
    """The columns of the ``keep`` widest-summed runs of ``width``, by brute force."""
    sums = [float(W[:, start : start + width].double().square().sum()) for start in range(0, W.shape[1], width)]
    best = sorted(range(len(sums)), key=lambda block: -sums[block])[:keep]
    return sorted(width * block + i for block in best for i in range(width))


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_each_structure_zeroes_what_brute_force_says(make_tiny, ids, kind):
    gelu = {"activation_function": "gelu"} if kind == "OPT" else {}  # a channel that never fires is worth nothing
    dense, model = make_tiny(kind, **gelu), make_tiny(kind, **gelu)
    prune_model(model, None, [CHANNELS, GROUPS], "magnitude", **QUIET, calibration=ids)
    (down, o), (fed, q, kv) = LEADERS[kind], FOLLOWERS[kind]
    sizes = head_sizes(model.config)
    for index in range(2):
        before, after = of_layer(dense, index), of_layer(model, index)
        channels = kept_columns(before[down], 1, round(0.75 * before[down].shape[1]))
        outputs = kept_columns(before[o], sizes["group"], 1)
        inner = [n for n in range(sizes["head"] * outputs[0] // sizes["group"], 10**6)][: sizes["head"]]
        for name in before:
            want = torch.zeros_like(before[name])
            if name in (down, o):
                columns = channels if name == down else outputs
                want[:, columns] = before[name][:, columns]
            else:
                rows = channels if name in fed else outputs if name in q else inner
                assert name in [*fed, *q, *kv]
                want[rows] = before[name][rows]
            assert torch.equal(after[name], want), name


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
def test_a_head_of_a_fused_projection_goes_with_its_queries_keys_and_values(make_tiny, ids, kind):
    dense, model = make_tiny(kind), make_tiny(kind)
    prune_model(model, None, HEADS, "magnitude", **QUIET, calibration=ids)
    o, fused = LEADERS[kind][1], {"GPT2": "attn.c_attn", "GPTNeoX": "attention.query_key_value"}[kind]
    for index in range(2):
        before, after = of_layer(dense, index), of_layer(model, index)
        columns = torch.tensor(kept_columns(before[o], 8, 3))
        # GPT-2 stacks all queries, then all keys, then all values; GPT-NeoX those of each head
        stacked = torch.arange(96).view(3, 4, 8) if kind == "GPT2" else torch.arange(96).view(4, 3, 8).transpose(0, 1)
        rows = stacked[:, columns[::8] // 8].flatten()
        assert set((after[fused] != 0).any(1).nonzero().flatten().tolist()) == set(rows.tolist())
        assert torch.equal(after[fused][rows], before[fused][rows])
        assert set((after[o] != 0).any(0).nonzero().flatten().tolist()) == set(columns.tolist())


def capture(model, ids, modules):
    """The second moment of what each module is given, by a pass of the whole model from the tokens on."""
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    flat = {name: X.reshape(-1, X.shape[-1]) for name, X in inputs.items()}
    return {name: (X.T @ X / len(X)).float() for name, X in flat.items()}


def prune_plainly(model, ids, solver, couplings):
    """Each coupling after the other, its leaders' inputs by a pass of the whole model."""
    for layer in model.model.layers:
        for coupling, names in couplings:
            linears = {name: layer.get_submodule(path) for name, path in names.items()}
            H = capture(model, ids, {n: m for n, m in linears.items() if n not in s3lab.parse(coupling).followers})
            found = s3lab.prune({name: m.weight.data for name, m in linears.items()}, coupling, H, solver)
            for name, solution in found.items():
                linears[name].weight.data.copy_(solution.weight)


MLP = {name: f"mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")}
ATTENTION = {name: f"self_attn.{name}" for name in ("o_proj", "q_proj", "k_proj", "v_proj")}
PAIR = "q_proj: (8,K) & o_proj: (M,8) keep 2"


@pytest.mark.parametrize("solver", ["sobs", "admm", "obd", "magnitude"])
def test_a_run_is_a_plain_loop_over_couplings(make_tiny, ids, solver):
    model, plain = make_tiny("Qwen3").double(), make_tiny("Qwen3").double()
    prune_model(model, None, [CHANNELS, GROUPS], solver, held_out=0.0, **QUIET, calibration=ids)
    groups = "o_proj: (M,16) & q_proj: (16,K) follows & k_proj: (8,K) follows & v_proj: (8,K) follows keep 1"
    channels = "down_proj: (M,1) & gate_proj: (1,K) follows & up_proj: (1,K) follows keep 75%"
    prune_plainly(plain, ids, solver, [(groups, ATTENTION), (channels, MLP)])
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hessians", ["pruned", "dense"])
def test_leaders_of_several_stages_are_solved_at_the_last(make_tiny, ids, hessians):
    model, plain = make_tiny("Llama", num_hidden_layers=1).double(), make_tiny("Llama", num_hidden_layers=1).double()
    run = prune_model(model, None, PAIR, "obd", held_out=0.0, hessians=hessians, **QUIET, calibration=ids)
    prune_plainly(plain, ids, "obd", [(PAIR, {name: ATTENTION[name] for name in ("q_proj", "o_proj")})])
    for name, W in matrices(plain).items():
        torch.testing.assert_close(matrices(model)[name], W, atol=1e-5, rtol=1e-4)
    assert [(row["name"], row["error"] is None) for row in run.matrices] == [
        ("self_attn.q_proj", False),
        ("self_attn.o_proj", False),
    ]


def test_rows_say_who_follows_and_settings_what_was_asked(make_tiny, ids):
    steps = []
    run = prune_model(
        make_tiny("Qwen3"),
        None,
        [CHANNELS, {"*.q_proj": "2:4", "*": "dense"}],
        "obd",
        calibration=ids,
        progress=steps.append,
    )
    rows = {(row["layer"], row["name"]): row for row in run.matrices}
    assert [step.name for step in steps[:4]] == [name for _, name in list(rows)[:4]]
    assert [step.solved for step in steps] == list(range(1, 9)) and steps[-1].total == 8
    for index in range(2):
        down, gate = rows[index, "mlp.down_proj"], rows[index, "mlp.gate_proj"]
        assert down["error"] > 0 and down["error_test"] > 0 and down["note"] == "" and down["tokens"] == 176
        assert gate["error"] is None and gate["tokens"] is None and gate["note"] == "follows down_proj"
        assert down["density"] == gate["density"] == 0.75 and gate["time_s"] == 0 < down["time_s"]
        assert down["spec"] == "down_proj: (M,1) & gate_proj: (1,K) follows & up_proj: (1,K) follows keep 75%"
        assert rows[index, "self_attn.q_proj"]["density"] == 0.5
    assert run.manifest["settings"]["spec"] == {"*": f"{CHANNELS}; dense", "*.q_proj": "2:4"}


def test_a_text_a_list_and_a_table_are_one(make_tiny, ids):
    ends = []
    forms = [
        f"{CHANNELS}; {GROUPS}",
        [CHANNELS, GROUPS],
        {"*": f"{CHANNELS}; {GROUPS}"},
        {"*.mlp.*": CHANNELS, "*.self_attn.*": GROUPS},
        [*read_couplings(CHANNELS, make_tiny("Qwen3").config)[:1], GROUPS],
    ]
    for form in forms:
        model = make_tiny("Qwen3")
        prune_model(model, None, form, "wanda", **QUIET, calibration=ids)
        ends.append(weights(model))
    assert all(same(ends[0], end) for end in ends[1:])


def test_globs_give_layers_their_own_budget_or_none(make_tiny, ids):
    model, dense = make_tiny("Llama", num_hidden_layers=3), make_tiny("Llama", num_hidden_layers=3)
    specs = {"layers.0.*": "dense", "layers.1.*": "mlp-channels keep 50%", "*": CHANNELS}
    prune_model(model, None, specs, {"layers.1.*.down_proj": "wanda", "*": "obd"}, **QUIET, calibration=ids)
    kept = [int((of_layer(model, index)["mlp.gate_proj"] != 0).any(1).sum()) for index in range(3)]
    assert kept == [64, 32, 48]
    assert all(torch.equal(W, matrices(dense)[name]) for name, W in matrices(model).items() if "self_attn" in name)


def test_the_first_leader_decides_the_solver(make_tiny, ids):
    run = prune_model(make_tiny("OPT"), None, CHANNELS, {"*.fc2": "wanda", "*": "sobs"}, **QUIET, calibration=ids)
    assert {(row["name"], row["solver"]) for row in run.matrices} == {("fc2", "Wanda()"), ("fc1", "Wanda()")}


def test_coupled_experts_that_saw_too_little_stay_dense(make_tiny, ids):
    expert = "experts.down_proj.{0}: (M,1) & experts.gate_up_proj.{0}: (2,M/2,K):(K*M/2,K,1) / (2,1,K) follows keep 50%"
    spec = "; ".join(expert.format(number) for number in range(4))
    left, damped = make_tiny("Qwen3Moe"), make_tiny("Qwen3Moe")
    run = prune_model(left, None, spec, "obd", min_tokens=10**6, **QUIET, calibration=ids)
    assert same(weights(left), weights(make_tiny("Qwen3Moe"))) and run.density == 1
    assert all("fewer than 1000000: left dense" in row["note"] for row in run.matrices)
    run = prune_model(damped, None, spec, "obd", min_tokens=10**6, scarce=0.5, **QUIET, calibration=ids)
    assert len(run.matrices) == 16 and run.density == 0.5
    for row in run.matrices:
        follows = "gate_up" in row["name"]
        assert row["damp"] == 0.5 and ("follows experts.down_proj" if follows else "damping 0.5") in row["note"]


class Stop(Exception):
    pass


def test_a_coupled_run_stopped_in_its_middle_ends_with_the_same_bits(make_tiny, ids, tmp_path):
    def stop(step):
        if step.solved == 11:  # in the second layer, between a leader and what follows it
            raise Stop

    whole, model = make_tiny("Qwen3", num_hidden_layers=3), make_tiny("Qwen3", num_hidden_layers=3)
    run = prune_model(whole, None, [CHANNELS, GROUPS], "admm", **QUIET, calibration=ids)
    call = {"solver": "admm", "batch": 4, "calibration": ids, "out": tmp_path}
    with pytest.raises(Stop):
        prune_model(make_tiny("Qwen3", num_hidden_layers=3), None, [CHANNELS, GROUPS], progress=stop, **call)
    again = prune_model(model, None, [CHANNELS, GROUPS], progress=False, **call)
    assert same(weights(whole), weights(model)) and untimed(run.matrices) == untimed(again.matrices)
    read = prune_model(make_tiny("Qwen3", num_hidden_layers=3), None, f"{CHANNELS}; {GROUPS}", progress=False, **call)
    assert read.matrices == again.matrices


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("Qwen3Moe", CHANNELS, r"layers.0 cannot be coupled so: .*down_proj is missing.*there are self_attn.q_proj"),
        ("Qwen3", '"*_proj": (M,1) keep 50%', r"\*_proj is self_attn.q_proj and self_attn.k_proj"),
        ("Qwen3", "down_proj: (M,1) & fc1: (1,K) follows keep 50%", r"fc1 is missing; there are .*mlp.up_proj"),
        ("Qwen3", 'down_proj: (M,1) & "*.down_proj": (M,1) keep 50%', "two are the same matrix"),
        ("Qwen3", "down_proj: (M,1) & q_proj: (1,K) follows keep 50%", "layers.0: the grids of down_proj and q_proj"),
        ("Qwen3", "mlp-channels", "has no budget"),
        ("Qwen3", "mlp-chanels keep 75%", "similar name: mlp-channels"),
        ("Qwen3", "kv-groups keep 3", "layers.0: .*between 1 and 2"),
        ("Qwen3", f"2:4; {CHANNELS}", "takes nothing: all that '.' matches"),
        ("Qwen3", f"{CHANNELS}; mlp-channels keep 50%", "down_proj is missing"),
        ("Qwen3", f"{CHANNELS}; 2:4; 1:4", "1:4 takes nothing"),
        ("Qwen3", f"{CHANNELS}; {GROUPS}; 2:4", "2:4 takes nothing"),
    ],
)
def test_what_fits_no_layer_is_refused_before_anything_is_touched(make_tiny, ids, kind, spec, message):
    model = make_tiny(kind)
    with pytest.raises(SpecError, match=message):
        prune_model(model, None, spec, **QUIET, calibration=ids)
    assert same(weights(model), weights(make_tiny(kind)))


def test_every_text_of_every_structure_is_a_coupling(make_tiny):
    config = make_tiny("Llama").config
    for name, texts in STRUCTURES.items():
        found = read_couplings(f"{name} keep 50%", config)
        assert len(found) == len(texts) and all(s3lab.parse(str(coupling)) == coupling for coupling in found)
    assert read_tables(s3lab.parse("2:4")) == [{"*": [s3lab.parse("2:4")]}]
