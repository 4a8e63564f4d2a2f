"""Tuning: masks stay, the loss is what it says, a hand-written loop gives the same, a stopped run the same bits."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional

import s3lab as s3
from s3lab.errors import DataError, SolveError, SpecError
from s3lab.models.recover.distil import find_loss
from s3lab.models.recover.tune import tune_model
from s3lab.models.recover.tuning import Tuning
from s3lab.models.structure.capture import find_linears

FAST = {"steps": 4, "tokens": 64, "every": 2, "lr": 3e-3}


@pytest.fixture(scope="module")
def pair(make_tiny, ids):
    """A function from a family and a spec to a pruned model, the rows of its run, and the dense model."""

    known = {}

    def make(family="Qwen3", spec="2:4", dtype=torch.float32):
        if (key := (family, repr(spec), dtype)) not in known:
            dense = make_tiny(family).to(dtype)
            model = deepcopy(dense)
            run = s3.prune_model(model, None, spec, "magnitude", calibration=ids, progress=False)
            known[key] = model, run.matrices, dense
        return deepcopy(known[key])

    return make


def tune(model, rows, ids, teacher=None, progress=False, out=None, **options):
    tuning = Tuning(**FAST | options)
    return tune_model(model, rows, ids[2:], {"own": ids[:2]}, tuning, teacher=teacher, progress=progress, out=out)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["fixed", "spp", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_stay_only_matrices_learn_and_the_model_is_left_as_it_was(pair, ids, method, dtype):
    model, rows, _ = pair(dtype=dtype)
    before = weights(model.train())
    tuned = tune(model, rows, ids, method=method, lr=3e-2)
    names = {f"{name}.weight" for name in find_linears(model, "model.layers.*")}
    for name, W in weights(model).items():
        assert W.dtype == dtype and torch.equal(W != 0, before[name] != 0), name
        assert torch.equal(W, before[name]) == (name not in names), name
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert {type(m) for m in find_linears(model, "model.layers.*").values()} == {torch.nn.Linear}
    assert [row["step"] for row in tuned.rows] == [0, 2, 4]
    assert tuned.rows[-1]["own_perplexity"] < tuned.rows[0]["own_perplexity"]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("Llama", "8:16 plus 1:16"),
        ("Qwen2", "2:4 each way"),
        ("OPT", "4:8@8x1 then 2:4"),
        ("Qwen3", "mlp-channels keep 50%; 1:4"),
        ("Qwen3", {"*.up_proj": "block16", "*": "dense"}),
    ],
)
def test_any_pattern_keeps_its_mask(pair, ids, name, spec):
    model, rows, _ = pair(name, spec)
    before = weights(model)
    tune_model(model, rows, ids, {"own": ids}, Tuning(**FAST), progress=False)
    assert all(torch.equal(W != 0, before[name] != 0) for name, W in weights(model).items())
    assert any(not torch.equal(W, before[name]) for name, W in weights(model).items())


def test_a_zero_among_what_is_kept_may_be_trained_and_no_other(pair, ids):
    model, rows, _ = pair()
    W = model.model.layers[0].mlp.up_proj.weight
    pruned = W.detach().clone()
    place = tuple((pruned != 0).nonzero()[0].tolist())
    W.data[place] = 0.0
    tune(model, rows, ids)
    s3.parse("2:4").check(W != 0)
    group = place[1] // 4 * 4
    assert torch.equal((W != 0)[1:], (pruned != 0)[1:]) and (W != 0)[place[0], group : group + 4].sum() == 2


def test_fixed_is_adamw_on_the_kept_weights_written_by_hand(pair, ids):
    model, rows, _ = pair()
    other = deepcopy(model)
    found = tune(model, rows, ids, dtype="float32", tokens=160, batch=10, warmup=0.5)
    names = {name: p for name, p in other.named_parameters() if "_proj" in name}
    masks = {name: p != 0 for name, p in names.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in names.items()}
    for step, share in enumerate((0.5, 1.0, 1.0, 0.505)):
        loss = other(input_ids=ids[2:], labels=ids[2:]).loss
        gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        gradients = {name: g * masks[name] for name, g in gradients.items()}
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        for name, g in gradients.items():
            g = g / max(1.0, float(norm) + 1e-6)
            first, second = moments[name]
            first.lerp_(g, 0.1)
            second.lerp_(g.square(), 0.05)
            root = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
            names[name].data -= 3e-3 * share * first / (1 - 0.9 ** (step + 1)) / root
    assert found.rows[-1]["own_perplexity"] < found.rows[0]["own_perplexity"] and found.best_step == 4
    for name, p in names.items():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-3, atol=2e-4)


def test_the_loss_is_the_sum_of_its_terms(pair, ids):
    model, _, dense = pair()
    for part in (model, dense):
        part.requires_grad_(False)
    ours, theirs = (m(input_ids=ids, output_hidden_states=True) for m in (model, dense))
    p, q = (torch.distributions.Categorical(logits=out.logits.double()) for out in (theirs, ours))
    text = functional.nll_loss(ours.logits[:, :-1].log_softmax(-1).transpose(1, 2), ids[:, 1:])
    logits = torch.distributions.kl_divergence(p, q).mean()
    states = list(zip(ours.hidden_states, theirs.hidden_states, strict=True))[1:]
    hidden = sum(((h - t).norm() / t.norm()) ** 2 for h, t in states) / len(states)
    for terms, expected in ((["text"], text), (["logits"], logits), (["hidden"], hidden)):
        torch.testing.assert_close(find_loss(model, dense, ids, terms).double(), expected.double(), rtol=1e-4, atol=0)
    whole = find_loss(model, dense, ids, ["text", "logits", "hidden"])
    torch.testing.assert_close(whole.double(), text.double() + logits + hidden.double(), rtol=1e-4, atol=0)
    assert float(find_loss(dense, dense, ids, ["logits", "hidden"])) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [("logits",), ("hidden",), ("text", "logits", "hidden")])
def test_a_teacher_is_come_nearer_to_and_stays_as_it_is(pair, ids, loss):
    model, rows, dense = pair()
    before = weights(dense)
    with torch.no_grad():
        start = find_loss(model, dense, ids, loss)
        tune(model, rows, ids, dense, loss=loss)
        assert find_loss(model, dense, ids, loss) < start
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())


def test_parts_of_a_step_add_up_and_activations_may_be_computed_again(pair, ids):
    model, rows, _ = pair()
    found = []
    for options in ({"batch": 4}, {"batch": 3}, {"recompute": True}):
        other = deepcopy(model)
        tune(other, rows, ids, dtype="float32", steps=2, **options)
        found.append(weights(other))
    for other in found[1:]:
        for name, W in found[0].items():
            torch.testing.assert_close(other[name], W, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["fixed", "spp", "lora"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_run_that_was_stopped_ends_with_the_same_bits(pair, ids, tmp_path, method, at):
    model, rows, dense = pair(dtype=torch.bfloat16)
    whole, stopped, again = (deepcopy(model) for _ in range(3))
    expected = tune(whole, rows, ids, dense, method=method, steps=6)

    def stop(row):
        if row["step"] > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(stopped, rows, ids, dense, progress=stop, out=tmp_path, method=method, steps=6)
    assert {type(m) for m in find_linears(stopped, "model.layers.*").values()} == {torch.nn.Linear}
    heard = []
    torch.manual_seed(at)
    found = tune(again, rows, ids, dense, progress=heard.append, out=tmp_path, method=method, steps=6)
    assert [row["step"] for row in heard] == list(range(at, 7, 2)) and found == expected
    assert all(torch.equal(W, other) for W, other in zip(weights(whole).values(), weights(again).values(), strict=True))
    once_more = deepcopy(model)
    assert tune(once_more, rows, ids, dense, out=tmp_path, method=method, steps=6) == expected
    assert all(torch.equal(p, weights(whole)[name]) for name, p in once_more.named_parameters())


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(pair, ids, tmp_path):
    model, rows, dense = pair()
    tune(deepcopy(model), rows, ids, out=tmp_path)
    with pytest.raises(DataError, match="other settings: steps is 4 there, 6 here"):
        tune(deepcopy(model), rows, ids, out=tmp_path, steps=6)
    with pytest.raises(DataError, match="teacher is None there"):
        tune(deepcopy(model), rows, ids, dense, out=tmp_path, loss=("logits",))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        tune(deepcopy(model), rows, ids, out=tmp_path)


def test_what_gets_worse_ends_early_and_leaves_the_weights_as_they_were(pair, ids):
    model, rows, _ = pair()
    by_heart = Tuning(steps=40, tokens=32, every=40, lr=1e-2)  # as a random model gets better by anything
    tune_model(model, rows, ids[:2], {"own": ids[:2]}, by_heart, progress=False)
    before = weights(model)
    other = torch.cat([ids[:2], torch.full_like(ids[2:], 7)])  # which says nothing of the text held out
    tuned = tune(model, rows, other, lr=3e-2, warmup=0.0, steps=50, every=1, patience=3)
    assert tuned.best_step == 0 and [row["step"] for row in tuned.rows] == [0, 1, 2, 3]
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


def test_each_sequence_comes_once_before_any_comes_again(pair, ids):
    model, rows, _ = pair()
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"]) if module.training else None, with_kwargs=True
    )
    tune(model, rows, ids, steps=5)
    hook.remove()
    assert len(seen) == 20
    for turn in (seen[:10], seen[10:]):
        assert {tuple(row.tolist()) for row in turn} == {tuple(row.tolist()) for row in ids[2:]}


def test_more_texts_are_measured_and_decide_nothing(pair, ids):
    model, rows, _ = pair()
    texts = {"own": ids[:2], "other": ids[2:4]}
    tuned = tune_model(model, rows, ids[2:], texts, Tuning(**FAST), progress=False)
    assert all({"own_perplexity", "other_perplexity"} < row.keys() for row in tuned.rows)
    assert tuned.best_step == min(tuned.rows, key=lambda row: row["own_perplexity"])["step"]


def test_what_cannot_be_tuned_is_refused_by_name_and_left_as_it_was(pair, make_tiny, ids):
    model, rows, dense = pair()
    before = weights(model)
    for message, call in {
        "OPTForCausalLM has no matrix": lambda: tune(make_tiny("OPT"), [{**rows[0], "name": "q"}], ids),
        "no matrix is pruned": lambda: tune(model, [{**row, "density": 1.0} for row in rows], ids),
        "is no record": lambda: tune(model, [{"layer": 0}], ids),
        "is kept by a Conv1D": lambda: tune(*pair("GPT2")[:2], ids),
        "no held-out text": lambda: tune_model(model, rows, ids, {}),
        "vocab_size": lambda: tune(model, rows, ids, make_tiny("Qwen3", vocab_size=32)),
        "the loss nll is none": lambda: tune(model, rows, ids, dense, loss=("nll",)),
        "the loss hidden is of a teacher": lambda: tune(model, rows, ids, loss=("hidden",)),
    }.items():
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(SpecError, match="does not fit the model"):
        tune(model, rows, torch.zeros(4, 128).long())
    with pytest.raises(SpecError, match=r"model.layers.0.*the weight breaks 2:4"):
        tune(dense, rows, ids)
    with pytest.raises(SolveError, match="lower lr"):
        tune(model, rows, ids, lr=1e30, warmup=0.0)
    for bad in (
        {"method": "rigl"},
        {"steps": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 2.0},
        {"dtype": "int8"},
    ):
        with pytest.raises(SolveError):
            Tuning(**bad)
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items() if "embed" in name)
    assert {type(m) for m in find_linears(model, "model.layers.*").values()} == {torch.nn.Linear}


@pytest.mark.gpu
def test_it_learns_on_cuda(pair, ids):
    model, rows, dense = pair()
    tuned = tune(model.cuda(), rows, ids, dense.cuda())
    assert tuned.rows[-1]["own_perplexity"] < tuned.rows[0]["own_perplexity"]
