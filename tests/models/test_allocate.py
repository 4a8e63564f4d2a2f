"""A budget is met, spent where it counts, found again, and refused where it cannot be."""

import json
from dataclasses import dataclass
from itertools import product

import pytest
import torch

import s3lab as s3
from s3lab.algebra.patterns import parse
from s3lab.errors import DataError, SpecError
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.search import evolve as evolution
from s3lab.models.search.allocate import Allocation, read_target
from s3lab.models.search.cost import count_bytes
from s3lab.models.search.evolve import Search
from s3lab.models.search.families import read_family
from s3lab.models.search.ladder import build_ladders
from s3lab.models.search.methods import METHODS, TOLERANCE
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.text.reference import perplexity
from s3lab.packing.codec import pack
from s3lab.solvers import Wanda
from s3lab.tensors.hessian import hessian

QUIET = {"progress": False, "batch": 4}
SHORT = Search(steps=(2, 1), generations=2, offspring=2)
EVEN = "{n in 2..14 by 2}:16"
SOLVES = []


@dataclass(frozen=True)
class Counting(Wanda):
    """Wanda that says what it solves."""

    def solve(self, problem, bound):
        SOLVES.append(bound.text)
        return super().solve(problem, bound)


@pytest.fixture
def solves():
    SOLVES.clear()
    return SOLVES


def kept(model):
    """The weights of the matrices by name."""
    return {name: m.weight.clone() for layer in find_decoder(model).matrices for name, m in layer.items()}


@pytest.mark.parametrize(
    ("method", "cost", "target"), [("error", "bytes", 0.6), *((method, "weights", 0.5) for method in METHODS)]
)
def test_every_method_meets_its_target_and_prune_model_takes_what_it_gives(make_tiny, ids, method, cost, target):
    model = make_tiny("Qwen3")
    before = model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    found = s3.allocate(
        model, EVEN, target, method, cost=cost, solver="wanda", calibration=ids, search=SHORT, windows=2, **QUIET
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    s3.prune_model(model, None, found, "wanda", calibration=ids, **QUIET)
    spent = total = 0.0
    for name, W in kept(model).items():
        spec = found[name]
        weights, bits = W.numel(), 8 * W.element_size()
        if spec == "dense":
            own = 1.0
        else:
            parse(spec).check(W != 0)
            own = float((W != 0).double().mean()) if cost == "weights" else pack(W, spec).theory_bits / bits
        spent, total = spent + own * weights, total + weights
    assert spent / total == pytest.approx(target, rel=TOLERANCE)
    assert found.share == pytest.approx(spent / total)


@pytest.mark.parametrize(
    ("text", "cost", "target"),
    [
        ("{n}:8@1x2", "weights", "50%"),
        ("{p}%/row", "bytes", "60%"),
        ("{p in 25..75 by 25}% columns", "weights", "50%"),
        ("{p}%@4x4", "weights", "50%"),
        ("{n in 2..8}:16 plus 4:32", "weights", "50%"),
        ("mlp-channels keep {p}%", "weights", "50%"),
        ("kv-groups keep {n}", "weights", "50%"),
        ({"*.mlp.*": "mlp-channels keep {p}%", "*.v_proj": "dense", "*": EVEN}, "weights", "60%"),
    ],
)
def test_families_of_every_kind_bind_and_prune(make_tiny, ids, text, cost, target):
    model = make_tiny("Qwen3")
    found = s3.allocate(model, text, target, cost=cost, solver="wanda", calibration=ids, **QUIET)
    run = s3.prune_model(model, None, found, "wanda", hessians="dense", calibration=ids, **QUIET)
    assert found.share == pytest.approx(read_target(target), rel=TOLERANCE)
    if cost == "weights" and isinstance(text, str):
        dense = [row for row in found.rows if row["spec"] == "dense"]
        if not dense:  # which leave no row in a run
            assert run.density == pytest.approx(found.share)


def test_the_bytes_are_those_of_the_codec():
    for spec in ("2:4", "8:16", "2:4@1x2", "50%/row", "50% columns", "4:8@16x1 then 2:4"):
        pattern, W = parse(spec), torch.randn(16, 32, dtype=torch.bfloat16)
        W = W * pattern.bind((16, 32)).project(W.float().abs())
        assert 8 * count_bytes(pattern, {"": (16, 32)}, 16) / W.numel() == pytest.approx(pack(W, pattern).theory_bits)


def test_uniform_is_the_plain_spec_where_that_costs_just_so(make_tiny, ids):
    model = make_tiny("Llama")
    found = s3.allocate(model, "{n}:16", "50%", "uniform", cost="weights", calibration=ids, **QUIET)
    assert set(found.values()) == {"8:16"} and found.facts["solver"] is None
    between = s3.allocate(model, "{n}:16", "53%", "uniform", cost="weights", calibration=ids, **QUIET)
    assert set(between.values()) == {"8:16", "9:16"}


def test_error_loses_no_more_than_uniform_and_tells_each_curve(make_tiny, ids):
    model = make_tiny("Qwen3")
    found = s3.allocate(model, EVEN, "50%", "error", cost="weights", solver="wanda", calibration=ids, **QUIET)
    plain = sum(row["curve"]["8:16"] ** 2 for row in found.rows)
    ours = sum(row["error"] ** 2 for row in found.rows)
    assert ours == pytest.approx(found.facts["loss"]) and found.facts["bound"] <= ours < plain
    pruned = s3.prune_model(model, None, found, "wanda", hessians="dense", calibration=ids, **QUIET)
    solved = {f"model.layers.{row['layer']}.{row['name']}": row["error"] for row in pruned.matrices}
    for row in found.rows:
        assert solved.get(row["name"], 0.0) == pytest.approx(row["error"])


def test_error_is_the_best_of_all_allocations(make_tiny, ids):
    model = make_tiny("Llama", num_hidden_layers=1)
    family = {"*.k_proj": "{n in 1..3}:4", "*.v_proj": "{n in 1..3}:4", "*.q_proj": "{n in 1..3}:4", "*": "dense"}
    found = s3.allocate(model, family, "50%", "error", cost="weights", solver="obd", calibration=ids, **QUIET)
    curves = [list(row["curve"].items()) for row in found.rows]
    sizes = {"q_proj": 32 * 32, "k_proj": 16 * 32, "v_proj": 16 * 32}
    own = [next(size for kind, size in sizes.items() if kind in row["name"]) for row in found.rows]
    share = {"1:4": 0.25, "2:4": 0.5, "3:4": 0.75, "dense": 1.0}
    best = min(
        sum(error**2 for _, error in choice)
        for choice in product(*curves)
        if sum(n * share[text] for n, (text, _) in zip(own, choice, strict=True)) <= 0.5 * sum(own)
    )
    assert found.facts["loss"] == pytest.approx(best)


def test_unless_told_it_goes_by_the_loss_and_a_search_begins_there(make_tiny, ids):
    model = make_tiny("Qwen3")
    options = {"cost": "weights", "solver": "wanda", "calibration": ids, **QUIET}
    found = s3.allocate(model, EVEN, "50%", **options)
    by_error = s3.allocate(model, EVEN, "50%", "error", **options)
    weights = found.facts["sensitivity"]

    def add_up(allocation):
        return sum(w * row["error"] ** 2 for w, row in zip(weights, allocation.rows, strict=True))

    assert found.facts["method"] == "loss" and add_up(found) == pytest.approx(found.facts["loss"])
    assert add_up(found) < add_up(by_error) and found.table != by_error.table
    once = Search(steps=(1,), generations=1, offspring=1)
    searched = s3.allocate(model, EVEN, "50%", "search", search=once, **options)
    s3.prune_model(model, None, found, "wanda", hessians="dense", calibration=ids, **QUIET)
    seen = torch.cat([chunk.ids for chunk in cut_chunks(ids, 0.1, 4, 0) if not chunk.held_out])[:8]
    assert searched.facts["perplexity_before"] == pytest.approx(perplexity(model, seen), rel=1e-5)


def test_a_search_ends_no_worse_than_it_began_and_tells_perplexities_that_hold(make_tiny, ids):
    model = make_tiny("Qwen3")
    options = {"cost": "weights", "solver": "wanda", "calibration": ids, "held_out": 0.0, **QUIET}
    found = s3.allocate(
        model, EVEN, "50%", "search", search=Search(steps=(4, 1), generations=3, offspring=4), **options
    )
    assert found.facts["perplexity_after"] <= found.facts["perplexity_before"]
    s3.prune_model(model, None, found, "wanda", hessians="dense", calibration=ids, held_out=0.0, **QUIET)
    seen = torch.cat([chunk.ids for chunk in cut_chunks(ids, 0.0, 4, 0)])[:8]
    assert perplexity(model, seen) == pytest.approx(found.facts["perplexity_after"], rel=1e-5)


def test_evolution_finds_the_only_best_of_a_small_space_within_the_budget():
    costs = [[1.0, 2.0, 3.0]] * 4

    def fitness(rungs):
        assert 8.0 * (1 - 1e-9) <= sum(c[r] for c, r in zip(costs, rungs, strict=True)) <= 8.0
        return float(sum(abs(r - w) for r, w in zip(rungs, (2, 2, 0, 0), strict=True)))

    search = Search(steps=(2, 1), generations=20)
    assert evolution.evolve((1, 1, 1, 1), costs, 8.0, fitness, search, 0.0) == ((2, 2, 0, 0), 0.0)


def test_outliers_in_a_layer_bring_it_more(make_tiny, ids):
    model = make_tiny("Llama")
    for matrix in find_decoder(model).matrices[1].values():
        matrix.weight[::3, ::7] *= 30
    found = s3.allocate(model, "{n}:16", "50%", "owl", cost="weights", calibration=ids, **QUIET)
    share = [sum(row["share"] for row in found.rows if f"layers.{n}." in row["name"]) for n in (0, 1)]
    assert share[1] > share[0]
    aims = found.facts["sparsity"]
    assert max(aims) - min(aims) == pytest.approx(0.16)  # twice the paper's λ = 0.08


def test_sensitivity_is_the_rise_of_the_loss_of_a_single_linear_layer(make_tiny, ids):
    """What a matrix does to the loss is told by the gradient: a matrix of which nothing hangs on has none."""
    model = make_tiny("Llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()  # so what gate and up make is lost
    found = s3.allocate(model, EVEN, "50%", "loss", cost="weights", solver="wanda", calibration=ids, **QUIET)
    weights = dict(zip([row["name"] for row in found.rows], found.facts["sensitivity"], strict=True))
    assert weights["model.layers.0.mlp.up_proj"] == weights["model.layers.0.mlp.gate_proj"] == 0.0
    assert weights["model.layers.1.mlp.up_proj"] > 0
    assert found["model.layers.0.mlp.up_proj"] == "2:16"


def test_a_stopped_run_solves_no_rung_again(make_tiny, ids, tmp_path, solves):
    model = make_tiny("Llama")
    options = {"cost": "weights", "solver": Counting(), "calibration": ids, "out": tmp_path / "out", "batch": 4}

    class Stop(Exception):
        pass

    def stop(layer, text):
        if len(solves) >= 7 * 4:
            raise Stop

    with pytest.raises(Stop):
        s3.allocate(model, "{n in 4..12}:16", "50%", **options, progress=stop)
    assert len(solves) == 7 * 4
    first = s3.allocate(model, "{n in 4..12}:16", "50%", **options, progress=False)
    assert len(solves) == 2 * 7 * 9 and len({*solves}) == 9
    again = s3.allocate(model, "{n in 4..12}:16", "50%", **options, progress=False)
    other = s3.allocate(model, "{n in 4..12}:16", "62%", "loss", **options, progress=False)
    s3.allocate(model, "{n in 4..12}:16", "50%", **{**options, "cost": "bytes"}, progress=False)
    assert len(solves) == 2 * 7 * 9  # another target, method or cost asks for nothing new
    assert first == again and first.record == again.record and other.share > first.share
    assert json.loads((tmp_path / "out" / "allocation.json").read_text())["rows"][0]["curve"]
    s3.allocate(model, "{n in 4..12}:16", "50%", **{**options, "damp": 0.1}, progress=False)
    assert len(solves) == 2 * 2 * 7 * 9  # another damping does


def test_a_search_that_is_asked_again_measures_nothing_again(make_tiny, ids, tmp_path, monkeypatch):
    model = make_tiny("Llama")
    options = {"cost": "weights", "solver": "wanda", "calibration": ids, "out": tmp_path, "search": SHORT, **QUIET}
    first = s3.allocate(model, "{n in 4..12}:16", "50%", "search", **options)
    monkeypatch.setattr(evolution, "perplexity", None)  # whoever measures fails
    assert s3.allocate(model, "{n in 4..12}:16", "50%", "search", **options).record == first.record


def test_moments_are_those_that_prune_model_keeps(make_tiny, ids, tmp_path, monkeypatch):
    model = make_tiny("Llama")
    found = s3.allocate(model, EVEN, 0.5, calibration=ids, solver="wanda", moments=tmp_path, **QUIET)
    monkeypatch.setattr("s3lab.models.prune.sequential.Flow", None)  # no passage is begun
    run = s3.prune_model(model, None, found, "wanda", hessians="dense", moments=tmp_path, calibration=ids, **QUIET)
    assert len(run.matrices) == sum(spec != "dense" for spec in found.values())


@pytest.mark.parametrize(
    ("text", "target", "options", "message"),
    [
        ("{n}:16", "5%", {}, "below .*, the least of"),
        ("{n}:16", "0%", {}, "no share"),
        ("{n}:16", "150%", {}, "no share"),
        ("{n}:16", "1e9999999999%", {}, "no share"),
        ("{n}:16", float("nan"), {}, "no share"),
        ("{n in 8..8}:16", "70%", {"method": "uniform", "cost": "weights"}, "the nearest that 'uniform' comes to"),
        ("{n}:16", "50%", {"method": "luck"}, "no method is called 'luck'"),
        ("{n}:16", "50%", {"cost": "euros"}, "no cost is called 'euros'"),
        ("{n}:17", "50%", {}, "does not fit"),
        ("{n};16", "50%", {}, "cannot read the spec"),
        ("2:4", "50%", {}, "leaves no place open"),
        ("{n}:{n}", "50%", {}, "more than one"),
        ("{m}:16", "50%", {}, "is no open place"),
        ("{n of 4}:16", "50%", {}, "is no open place"),
        ("{n in 4..}:16", "50%", {}, "is no open place"),
        ("{n in 0..4}:16", "50%", {}, "is no open place"),
        ("{n in 9..4}:16", "50%", {}, "holds no number"),
        ("{n in 1..9999}:16", "50%", {}, "more than 256"),
        ("{n in 12..20}:16", "50%", {}, "does not fit"),
        ({"*": "dense"}, "50%", {}, "all matrices are to stay dense"),
        ({"*.mlp": "{n}:16", "*": "dense"}, "50%", {}, "decides no matrix"),
        ({"*.mlp.*": "mlp-channels keep {p}%", "*": "kv-groups keep {n}"}, "50%", {}, "second coupling"),
    ],
)
def test_what_cannot_be_allocated_is_told(make_tiny, ids, text, target, options, message):
    with pytest.raises(SpecError, match=message):
        s3.allocate(make_tiny("Llama", num_hidden_layers=1), text, target, calibration=ids, **options, **QUIET)


def test_experts_that_saw_too_little_are_told(make_tiny, ids):
    with pytest.raises(DataError, match="cannot be budgeted"):
        s3.allocate(make_tiny("Qwen3Moe"), "{n}:16", "50%", calibration=ids, solver="wanda", min_tokens=10**6, **QUIET)


def test_every_family_of_models_is_budgeted(make_tiny, ids, family):
    model = make_tiny(family)
    options = {"cost": "weights", "solver": "wanda", "calibration": ids, "min_tokens": 0, **QUIET}
    found = s3.allocate(model, "{n in 4..12 by 2}:16", "50%", "loss", **options)
    assert found.share == pytest.approx(0.5, rel=TOLERANCE) and set(found) == set(kept(model))


def test_rungs_climb_without_repeats(make_tiny):
    model = make_tiny("Llama")
    ladders, dense = build_ladders(find_decoder(model), model.config, {"*": "{p in 4..96 by 4}%/column"}, count_bytes)
    for ladder in ladders:
        assert ladder.costs == sorted(set(ladder.costs)) and ladder.rungs[-1].text == "dense"
    assert not dense and len([*read_family("{p}%")]) == 19


def test_an_allocation_is_a_table(make_tiny, ids):
    found = Allocation({"a": "2:4", "b": "dense"}, [{"name": "a", "spec": "2:4", "curve": {}}], {"share": 0.5})
    assert dict(found) == {"a": "2:4", "b": "dense"} and "curve" not in found._repr_html_()


def test_the_weights_of_a_solve_are_those_of_prune(make_tiny, ids, tmp_path):
    """What the search puts together is what the solver made of these inputs."""
    model = make_tiny("Llama", num_hidden_layers=1)
    dense = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    inputs = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    options = {"cost": "weights", "solver": "sparsegpt", "calibration": ids, "held_out": 0.0, "out": tmp_path}
    found = s3.allocate(model, "{n}:16", "50%", **options, **QUIET)
    for n in (4, 8, 12):
        error = s3.prune(dense, f"{n}:16", hessian(inputs[0]), "sparsegpt").error
        assert found.rows[0]["curve"][f"{n}:16"] == pytest.approx(error, rel=1e-3)
