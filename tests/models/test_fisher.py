"""What the loss says of tokens and outputs is what autograd says, and a run prunes by it."""

import pytest
import torch

import s3lab as s3
from s3lab.errors import DataError, SolveError
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.prune.fisher import measure_fisher
from s3lab.models.structure.decoder import find_decoder

transformers = pytest.importorskip("transformers")

QUIET = {"progress": False, "batch": 4}
STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def modules(model):
    """The modules of single matrices by name: all but experts."""
    found = {name: m for layer in find_decoder(model).matrices for name, m in layer.items()}
    return {name: m.module for name, m in found.items() if m.expert is None}


def gradients(model, ids):
    """∂L/∂y of each matrix, (N, L, M) of sequences (N, L): those of a zero that is added to y."""
    zeros, hooks = {}, []
    for name, module in modules(model).items():

        def add(module, args, out, name=name):
            zeros[name] = torch.zeros_like(out, requires_grad=True)
            return out + zeros[name]

        hooks.append(module.register_forward_hook(add))
    log = model(ids).logits[:, :-1].log_softmax(-1)
    loss = -log.gather(2, ids[:, 1:, None]).sum()
    found = torch.autograd.grad(loss, list(zeros.values()))
    for hook in hooks:
        hook.remove()
    return {name: g.view(*ids.shape, -1) for name, g in zip(zeros, found, strict=True)}


def inputs(model, ids, name):
    """What a matrix reads, (N, L, K)."""
    met = []
    hook = modules(model)[name].register_forward_pre_hook(lambda module, args: met.append(args[0].detach()))
    model(ids)
    hook.remove()
    return met[0]


def test_squares_are_those_of_autograds_gradients(make_tiny, ids, family):
    model = make_tiny(family).double()
    if family == "Qwen3Moe":
        model.set_experts_implementation("eager")  # as a run does; the other way knows no float64
    model.lm_head.weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    chunks = cut_chunks(ids, 0.25, 4, seed=2)
    fisher = measure_fisher(model, find_decoder(model), chunks)
    assert [p.requires_grad for p in model.parameters()] == wanted and all(p.grad is None for p in model.parameters())

    assert fisher.outputs.keys() == fisher.tokens.keys() == modules(model).keys()
    own = gradients(model, torch.cat([chunk.ids for chunk in chunks if not chunk.held_out]))
    for name, g in own.items():
        torch.testing.assert_close(fisher.outputs[name], g.square().mean((0, 1)), rtol=1e-6, atol=1e-15)
    for chunk in chunks:
        for name, g in gradients(model, chunk.ids).items():
            expected = g.square().sum(-1).flatten() / own[name].square().sum(-1).mean()
            torch.testing.assert_close(fisher.tokens[name][chunk.number].double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("hessians", ["pruned", "dense"])
def test_a_run_is_a_plain_loop_by_weighted_moments(make_tiny, ids, hessians):
    model, plain, dense = (make_tiny("Qwen3").double() for _ in range(3))
    chunks = cut_chunks(ids, 0.25, 4, seed=0)
    parts = [torch.cat([chunk.ids for chunk in chunks if chunk.held_out == held]) for held in (False, True)]
    given = [gradients(dense, part) for part in parts]
    run = s3.prune_model(
        model, None, "50%", "sobs", hessian="loss", hessians=hessians, held_out=0.25, **QUIET, calibration=ids
    )
    assert run.manifest["settings"]["hessian"] == "loss"
    errors = []
    for layer in range(2):
        for stage in STAGES:
            names = [f"model.layers.{layer}.{name}" for name in stage]
            read = [[inputs(plain if hessians == "pruned" else dense, part, name) for part in parts] for name in names]
            for name, own in zip(names, read, strict=True):
                moments = []
                for X, g in zip(own, given, strict=True):
                    norms = g[name].square().sum(-1)
                    moments.append(torch.einsum("nt,nti,ntj->ij", norms, X, X).float() / norms.numel())
                W, G = modules(plain)[name].weight.data, given[0][name].square().mean((0, 1))
                solution = s3.prune(W, "50%", moments[0], "sobs", H_test=moments[1], outputs=G)
                W.copy_(solution.weight)
                errors.append((solution.error, solution.error_test))
    for name, module in modules(plain).items():
        torch.testing.assert_close(modules(model)[name].weight, module.weight, atol=1e-5, rtol=1e-4)
    assert [(row["error"], row["error_test"]) for row in run.matrices] == [pytest.approx(e, rel=1e-4) for e in errors]


class Stop(Exception):
    pass


def test_a_run_by_the_loss_goes_on_to_the_same_bits(make_tiny, ids, tmp_path):
    def prune(model, **options):
        return s3.prune_model(model, None, "50%", "wanda", hessian="loss", batch=4, calibration=ids, **options)

    whole, broken = make_tiny("Qwen3"), make_tiny("Qwen3")
    rows = prune(whole, progress=False).matrices

    def stop(step):
        if step.solved == 10:
            raise Stop

    with pytest.raises(Stop):
        prune(broken, progress=stop, out=tmp_path)
    resumed = make_tiny("Qwen3")
    found = prune(resumed, progress=False, out=tmp_path).matrices
    assert [row["error"] for row in found] == [row["error"] for row in rows]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
    with pytest.raises(DataError, match="hessian is 'loss' there, 'inputs' here"):
        s3.prune_model(make_tiny("Qwen3"), None, "50%", "wanda", out=tmp_path, **QUIET, calibration=ids)


def test_moments_by_the_loss_are_kept_apart_from_those_of_inputs(make_tiny, ids, tmp_path):
    options = {"hessians": "dense", **QUIET, "calibration": ids}
    models = [make_tiny("Qwen3") for _ in range(3)]
    for model, folder in zip(models, (None, tmp_path / "loss", tmp_path / "loss"), strict=True):
        s3.prune_model(model, None, "50%", "obd", hessian="loss", moments=folder, **options)
    for other in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), other.parameters(), strict=True))
    with pytest.raises(DataError, match="other settings \\(hessian\\)"):
        s3.prune_model(make_tiny("Qwen3"), None, "2:4", "obd", moments=tmp_path / "loss", **options)
    s3.prune_model(make_tiny("Qwen3"), None, "2:4", "obd", moments=tmp_path / "inputs", **options)
    with pytest.raises(DataError, match="other settings \\(hessian\\)"):
        s3.prune_model(make_tiny("Qwen3"), None, "2:4", hessian="loss", moments=tmp_path / "inputs", **options)


def test_experts_choose_their_tokens_and_so_are_not_weighed(make_tiny, ids):
    options = {"hessian": "loss", "hessians": "dense", **QUIET, "calibration": ids}
    with pytest.raises(DataError, match=r"experts.*the loss does not hang on every token"):
        s3.prune_model(make_tiny("Qwen3Moe"), None, "2:4", "obd", **options)
    run = s3.prune_model(make_tiny("Qwen3Moe"), None, {"*.self_attn.*": "2:4", "*": "dense"}, "obd", **options)
    assert len(run.matrices) == 8


def test_what_cannot_be_is_refused(make_tiny, ids):
    with pytest.raises(SolveError, match="hessian = 'output'"):
        s3.prune_model(make_tiny("Qwen3"), None, "2:4", hessian="output", **QUIET, calibration=ids)
    broken = make_tiny("Qwen3")
    broken.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(DataError, match="gradients of the loss leave the range"):
        s3.prune_model(broken, None, "2:4", hessian="loss", **QUIET, calibration=ids)
