"""A run prunes what a plain loop would prune, can be stopped anywhere, and leaves a model like any other."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import s3lab
from s3lab.errors import DataError, SpecError
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.prune.sequential import prune_model
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.structure.capture import capture_moments
from s3lab.models.structure.decoder import find_decoder

transformers = pytest.importorskip("transformers")

QUIET = {"progress": False, "batch": 4}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def matrices(model):
    return {name: m.weight for layer in find_decoder(model).matrices for name, m in layer.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def untimed(rows):
    return [{key: value for key, value in row.items() if key not in ("time_s", "mem_mib")} for row in rows]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


class Stop(Exception):
    pass


def stop_after(count):
    """A progress function that ends the run at the count-th step of this call."""
    steps = []

    def progress(step):
        steps.append(step)
        if len(steps) == count:
            raise Stop

    return progress


def test_every_family_is_pruned_saved_and_loaded_again(make_tiny, ids, family, tmp_path):
    model = make_tiny(family)
    untouched = {name: tensor for name, tensor in weights(model).items() if "layers" not in name and ".h." not in name}
    run = prune_model(model, None, "2:4", "sparsegpt", min_tokens=0, **QUIET, calibration=ids)
    assert len(run.matrices) == len(matrices(model)) and run.density == 0.5
    for W in matrices(model).values():
        s3lab.parse("2:4").check(W != 0)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in untouched.items())

    save_pruned(model, None, tmp_path, run)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert same(matrices(model), matrices(loaded))
    assert torch.equal(logits(model, ids), logits(loaded, ids))


def test_a_saved_model_brings_the_record_of_its_run_and_a_card(make_tiny, ids, tmp_path):
    model = make_tiny("Qwen3")
    run = prune_model(
        model, None, {"*.mlp.*": "1:4", "*": "2:4"}, "wanda", provenance={"text": "a poem"}, **QUIET, calibration=ids
    )
    save_pruned(model, None, tmp_path, run)
    record = json.loads((tmp_path / "s3lab.json").read_text())
    assert record["settings"]["spec"] == {"*.mlp.*": "1:4", "*": "2:4"} and record["matrices"] == run.matrices
    card = (tmp_path / "README.md").read_text()
    for told in ("Qwen3ForCausalLM, pruned", "`*.mlp.*`: `1:4`", "Wanda()", "| Text | a poem |", "| mlp.down_proj |"):
        assert told in card
    assert not list(tmp_path.glob(".*"))


def prune_plainly(model, ids, spec, solver):
    """Each group after the other, its inputs by a forward pass of the whole model from the tokens on."""
    gpt2 = hasattr(model, "transformer")
    layers = model.transformer.h if gpt2 else model.model.layers
    groups = (
        [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
        if gpt2
        else [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
    )
    errors = []
    for layer in layers:
        for group in groups:
            linears, inputs = [layer.get_submodule(name) for name in group], []
            hook = linears[0].register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            logits(model, ids)
            hook.remove()
            X = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            H = (X.T @ X / len(X)).float()
            for linear in linears:
                W = linear.weight.data.T if gpt2 else linear.weight.data
                solution = s3lab.prune(W, spec, H, solver)
                W.copy_(solution.weight)
                errors.append(solution.error)
    return errors


@pytest.mark.parametrize("kind", ["Qwen3", "GPT2"])
@pytest.mark.parametrize("solver", ["sobs", "sparsegpt", "magnitude"])
def test_a_run_is_a_plain_loop_from_the_tokens_on_at_every_stage(make_tiny, ids, kind, solver):
    model, plain = make_tiny(kind).double(), make_tiny(kind).double()
    run = prune_model(model, None, "2:4", solver, held_out=0.0, **QUIET, calibration=ids)
    errors = prune_plainly(plain, ids, "2:4", solver)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
    assert [row["error"] for row in run.matrices] == pytest.approx(errors, rel=1e-5)
    assert {row["tokens"] for row in run.matrices} == {ids.numel()} and not any(
        row["error_test"] for row in run.matrices
    )


def test_dense_hessians_are_those_of_the_untouched_model(make_tiny, ids):
    model, dense = make_tiny("Qwen3"), make_tiny("Qwen3")
    moments = capture_moments(dense, ids, "model.layers.*")
    prune_model(model, None, "2:4", "sobs", hessians="dense", held_out=0.0, **QUIET, calibration=ids)
    for name, W in matrices(dense).items():
        expected = s3lab.prune(W, "2:4", moments[name].value(), "sobs").weight
        torch.testing.assert_close(matrices(model)[name], expected, atol=1e-4, rtol=1e-3)


def test_what_is_held_out_decides_nothing(make_tiny, ids):
    model, other = make_tiny("Qwen3"), make_tiny("Qwen3")
    run = prune_model(model, None, "2:4", held_out=0.25, seed=3, **QUIET, calibration=ids)
    held = torch.cat([chunk.ids for chunk in cut_chunks(ids, 0.25, 4, 3) if chunk.held_out])
    assert len(held) == 3
    changed = ids.clone()
    changed[(ids[:, None] == held).all(-1).any(-1)] = 5
    run_2 = prune_model(other, None, "2:4", held_out=0.25, seed=3, **QUIET, calibration=changed)
    assert same(weights(model), weights(other))
    assert [row["error"] for row in run.matrices] == [row["error"] for row in run_2.matrices]
    assert all(
        row["error_test"] != row_2["error_test"] for row, row_2 in zip(run.matrices, run_2.matrices, strict=True)
    )


def test_the_held_out_error_is_that_of_the_held_out_tokens(make_tiny, ids):
    model, dense = make_tiny("Qwen3"), make_tiny("Qwen3")
    run = prune_model(model, None, "2:4", held_out=0.25, hessians="dense", **QUIET, calibration=ids)
    held = torch.cat([chunk.ids for chunk in cut_chunks(ids, 0.25, 4, 0) if chunk.held_out])
    moments = capture_moments(dense, held, "model.layers.*")
    for row in run.matrices:
        name = f"model.layers.{row['layer']}.{row['name']}"
        error = s3lab.output_error(matrices(model)[name], matrices(dense)[name], moments[name].value())
        assert row["error_test"] == pytest.approx(error, rel=1e-4)


def test_the_error_of_a_layer_is_that_of_its_output(make_tiny, ids):
    model, dense = make_tiny("Llama"), make_tiny("Llama")
    run = prune_model(model, None, "2:4", held_out=0.0, **QUIET, calibration=ids)
    with torch.no_grad():
        pairs = [m.model(ids, output_hidden_states=True).hidden_states[1].double() for m in (model, dense)]
    error = (pairs[0] - pairs[1]).norm() / pairs[1].norm()
    assert run.layers[0]["output_error"] == pytest.approx(float(error), rel=1e-5)
    assert [row["layer"] for row in run.layers] == [0, 1] and run.layers[1]["time_s"] > run.layers[0]["time_s"]


def test_globs_choose_spec_and_solver_and_the_rest_stays_dense(make_tiny, ids):
    model, dense = make_tiny("Qwen3"), make_tiny("Qwen3")
    specs = {"layers.0.*": "dense", "*.mlp.*": "1:4", "model.layers.1.self_attn.o_proj": "4:8", "*": "2:4"}
    run = prune_model(model, None, specs, {"*.mlp.*": "wanda", "*": s3lab.SparseGPT(width=8)}, **QUIET, calibration=ids)
    found = {row["name"]: (row["spec"], row["solver"], row["density"]) for row in run.matrices}
    assert len(found) == 7 and {row["layer"] for row in run.matrices} == {1}
    assert found["mlp.up_proj"] == ("1:4", "Wanda()", 0.25)
    assert found["self_attn.o_proj"] == ("4:8", "SparseGPT(width=8, impl='auto')", 0.5)
    for name, W in matrices(dense).items():
        assert torch.equal(W, matrices(model)[name]) == name.startswith("model.layers.0.")


def test_an_expert_that_saw_too_little_is_left_dense_or_damped(make_tiny, ids):
    left, damped = make_tiny("Qwen3Moe"), make_tiny("Qwen3Moe")
    run = prune_model(left, None, "2:4", min_tokens=10**6, **QUIET, calibration=ids)
    run_2 = prune_model(damped, None, "2:4", min_tokens=10**6, scarce=0.5, **QUIET, calibration=ids)
    for row, row_2 in zip(run.matrices, run_2.matrices, strict=True):
        expert = "experts" in row["name"]
        assert row["density"] == (1.0 if expert else 0.5) and row_2["density"] == 0.5
        assert bool(row["note"]) == bool(row_2["note"]) == expert
        assert row_2["damp"] == (0.5 if expert else 0.01)
        assert not expert or row["note"] == f"{row['tokens']} tokens, fewer than 1000000: left dense"
    dense = matrices(make_tiny("Qwen3Moe"))
    assert all(torch.equal(W, dense[name]) for name, W in matrices(left).items() if "experts" in name)


def test_dtype_and_mode_stay_and_figures_of_the_caller_join_the_layers(make_tiny, ids):
    model = make_tiny("Qwen3").bfloat16().train()
    run = prune_model(model, None, "2:4", measure=lambda model: {"zeros": zeros(model)}, **QUIET, calibration=ids)
    assert model.training and all(W.dtype == torch.bfloat16 for W in matrices(model).values())
    assert [row["zeros"] for row in run.layers] == [0.25, 0.5]


def zeros(model):
    found = torch.cat([W.flatten() == 0 for W in matrices(model).values()])
    return float(found.double().mean())


def test_on_disk_or_in_memory_the_bits_are_the_same(make_tiny, ids, tmp_path):
    one, other = make_tiny("Mistral"), make_tiny("Mistral")
    run = prune_model(one, None, "2:4", **QUIET, calibration=ids)
    run_2 = prune_model(other, None, "2:4", out=tmp_path, **QUIET, calibration=ids)
    assert same(weights(one), weights(other)) and untimed(run.matrices) == untimed(run_2.matrices)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3Moe"])
def test_a_run_stopped_again_and_again_ends_as_if_it_never_was(make_tiny, ids, kind, tmp_path):
    whole = make_tiny(kind, num_hidden_layers=3)
    run = prune_model(whole, None, "2:4", **QUIET, calibration=ids)
    matrices_per_layer, chance, stops = len(run.matrices) // 3, random.Random(0), 0
    while True:
        model = make_tiny(kind, num_hidden_layers=3)
        try:
            resumed = prune_model(
                model,
                None,
                "2:4",
                batch=4,
                out=tmp_path,
                progress=stop_after(chance.randint(2, 2 * matrices_per_layer)),
                calibration=ids,
            )
            break
        except Stop:
            stops += 1
    assert stops and same(weights(whole), weights(model)) and not resumed.damaged
    assert untimed(resumed.matrices) == untimed(run.matrices) and untimed(resumed.layers) == untimed(run.layers)


def spoil(path, how):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture(scope="module")
def stopped(make_tiny, ids, tmp_path_factory):
    """A model pruned at one go, and the folder of a run that stopped on the way to it."""
    whole, folder = make_tiny("Qwen3", num_hidden_layers=3), tmp_path_factory.mktemp("stopped")
    prune_model(whole, None, "2:4", **QUIET, calibration=ids)
    model = make_tiny("Qwen3", num_hidden_layers=3)
    with pytest.raises(Stop):
        prune_model(model, None, "2:4", batch=4, out=folder, progress=stop_after(17), calibration=ids)
    return whole, folder


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("place", ["manifest.json", "layers/000.*", "layers/001.*", "state/002/pruned-00000.*"])
def test_a_spoilt_file_is_noticed_and_made_again(make_tiny, ids, stopped, place, how, tmp_path):
    whole, folder = stopped
    out = shutil.copytree(folder, tmp_path / "run")
    (path,) = out.glob(place)
    spoil(path, how)
    model = make_tiny("Qwen3", num_hidden_layers=3)
    run = prune_model(model, None, "2:4", out=out, **QUIET, calibration=ids)
    assert run.damaged == [str(path.relative_to(out))]
    assert same(weights(whole), weights(model))


def test_a_finished_run_is_read_and_a_spoilt_one_finished_again(make_tiny, ids, tmp_path):
    whole = make_tiny("Qwen3")
    run = prune_model(whole, None, "2:4", out=tmp_path, **QUIET, calibration=ids)
    again = make_tiny("Qwen3")
    read = prune_model(again, None, "2:4", out=tmp_path, batch=4, progress=stop_after(1), calibration=ids)
    assert same(weights(whole), weights(again)) and read.matrices == run.matrices and read.layers == run.layers
    spoil(tmp_path / "layers" / "001.safetensors", "flipped")
    once_more = make_tiny("Qwen3")
    assert prune_model(once_more, None, "2:4", out=tmp_path, **QUIET, calibration=ids).damaged == [
        "layers/001.safetensors"
    ]
    assert same(weights(whole), weights(once_more))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"spec": "1:4"}, r"spec is \{'\*': '2:4'\} there, \{'\*': '1:4'\} here"),
        ({"solver": "wanda"}, "solver is .*ADMM.* there, .*Wanda.* here"),
        ({"damp": 0.1}, "damp is 0.01 there, 0.1 here"),
        ({"seed": 1}, "seed is 0 there"),
        ({"batch": 3}, "batch is 4 there"),
        ({"held_out": 0.5}, "held_out is 0.1 there"),
        ({"hessians": "dense"}, "hessians is 'pruned' there"),
        ({"calibration": torch.full((12, 16), 7)}, "calibration is"),
    ],
)
def test_a_run_of_other_settings_is_refused_and_they_are_named(make_tiny, ids, stopped, change, named):
    call = {"tokenizer": None, "calibration": ids, "spec": "2:4", "batch": 4, "out": stopped[1], "progress": False}
    with pytest.raises(DataError, match=f"has other settings: {named}"):
        prune_model(make_tiny("Qwen3", num_hidden_layers=3), **call | change)


def test_another_model_is_refused(make_tiny, ids, stopped):
    pruned, folder = stopped
    with pytest.raises(DataError, match="other settings: weights is"):
        prune_model(pruned, None, "2:4", out=folder, **QUIET, calibration=ids)
    with pytest.raises(DataError, match="other settings: model is 'Qwen3ForCausalLM' there"):
        prune_model(make_tiny("Llama", num_hidden_layers=3), None, "2:4", out=folder, **QUIET, calibration=ids)


def test_the_manifest_of_something_else_is_left_alone(make_tiny, ids, tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(DataError, match=r"files that s3lab did not make \(manifest.json\)"):
        prune_model(make_tiny("Qwen3"), None, "2:4", out=tmp_path, **QUIET, calibration=ids)
    (tmp_path / "s3lab.json").write_text("{}")
    with pytest.raises(DataError, match="belongs to something else"):
        prune_model(make_tiny("Qwen3"), None, "2:4", out=tmp_path, **QUIET, calibration=ids)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "an app"}'


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spec": "2:5"}, SpecError, r"model.layers.0.self_attn.q_proj: .*remainder"),
        ({"spec": "dense"}, SpecError, "all matrices are to stay dense"),
        ({"calibration": torch.full((1, 16), 7)}, DataError, "1 calibration sequences leave none"),
        ({"batch": 0}, DataError, "batch = 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(make_tiny, ids, change, error, message):
    model = make_tiny("Qwen3")
    with pytest.raises(error, match=message):
        prune_model(model, **{"tokenizer": None, "calibration": ids, "spec": "2:4", "progress": False} | change)
    assert same(weights(model), weights(make_tiny("Qwen3")))


def test_layers_that_are_given_more_than_hidden_states_are_refused(make_tiny, ids):
    model = make_tiny("Qwen3")
    body, first = model.model, model.model.layers[0]

    def tell_tokens(module, args, kwargs):
        first.seen = kwargs["input_ids"]

    def give_tokens(layer, args, kwargs):
        return args, kwargs | {"tokens": first.seen}

    body.register_forward_pre_hook(tell_tokens, with_kwargs=True)
    first.register_forward_pre_hook(give_tokens, with_kwargs=True, prepend=True)
    with pytest.raises(DataError, match="other arguments for other tokens"):
        prune_model(model, None, "2:4", **QUIET, calibration=ids)


SCRIPT = """
import sys, torch
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM
from safetensors.torch import save_file
from s3lab.models.prune.sequential import prune_model
torch.set_num_threads(1)
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(hidden_size=32, num_hidden_layers=4, intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0))
ids = torch.randint(3, 64, (12, 16), generator=torch.Generator().manual_seed(1))
out = Path(sys.argv[1])
prune_model(model, None, "2:4", out=out, batch=4, progress=lambda step: print(step.solved, flush=True), calibration=ids)
save_file({name: p.data for name, p in model.named_parameters() if "embed" not in name and "head" not in name},
    out / "end.safetensors")
"""


def kill_after(lines, out):
    """Run the script, kill it after so many lines of progress, and tell whether it came to its end before."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, out], stdout=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(lines):
                if not process.stdout.readline():
                    break
        finally:
            process.kill()
    return process.returncode == 0


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "whole"], check=True, stdout=subprocess.DEVNULL)
    chance = random.Random(0)
    for _ in range(4):
        kill_after(chance.randint(0, 14), tmp_path / "killed")
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "killed"], check=True, stdout=subprocess.DEVNULL)
    whole, killed = (Path(tmp_path / name / "end.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
