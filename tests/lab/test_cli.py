"""The commands on tiny things, what they say when they cannot, and how they help."""

import json

import pytest
import torch

from s3lab import PATTERNS
from s3lab.lab import cli
from s3lab.models.prune.layerwise import prune_layer
from s3lab.models.text.pretrained import load_model, to_fast_dtype
from s3lab.solvers.damping import LADDER

SMALL = ["--calibration", "stdlib", "--sequences", "4", "--length", "32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a random model of two layers, with the reference model's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 2048}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    load_model("reference")[1].save_pretrained(folder)
    return folder


def test_prune_saves_a_model_that_loads_and_goes_on_where_it_was(tiny, tmp_path, capsys):
    out = tmp_path / "pruned"
    specs = ["--spec", "*.mlp.*=2:4", "--spec", "*.o_proj=1:4", "--spec", "*=dense"]
    command = ["prune", str(tiny), *specs, "--solver", "obd", *SMALL, "--out", str(out)]
    assert cli.main(command) == 0
    first = (out / "model.safetensors").read_bytes()
    model, _ = load_model(out)
    for layer in model.model.layers:
        assert (layer.mlp.up_proj.weight == 0).double().mean() == 0.5
        assert (layer.self_attn.o_proj.weight == 0).double().mean() == 0.75
        assert (layer.self_attn.q_proj.weight != 0).all()
    record = json.loads((out / "s3lab.json").read_text())
    assert len(record["matrices"]) == 8 and record["facts"]["provenance"]["text"] == "stdlib"
    assert cli.main(command) == 0
    assert (out / "model.safetensors").read_bytes() == first
    assert "kept 46.4% of 8 matrices" in capsys.readouterr().out


def test_half_precision_is_kept_and_worked_on_in_what_the_cpu_is_fast_in(tiny, tmp_path, monkeypatch, capsys):
    half, out = tmp_path / "half", tmp_path / "out"
    model, tokenizer = load_model(tiny, "bfloat16")
    for part in (model, tokenizer):
        part.save_pretrained(half)
    monkeypatch.setattr("s3lab.tensors.meter._time_product", lambda dtype: 9.0 if dtype == torch.bfloat16 else 1.0)
    assert cli.main(["prune", str(half), "--spec", "2:4", "--solver", "obd", *SMALL, "--out", str(out)]) == 0
    pruned, _ = load_model(out)
    assert {W.dtype for W in pruned.parameters()} == {torch.bfloat16}
    assert (pruned.model.layers[0].mlp.up_proj.weight == 0).double().mean() == 0.5
    told = []
    for dtype in ("auto", "float32", "bfloat16"):
        capsys.readouterr()
        assert cli.main(["eval", str(half), "--documents", "1", "--length", "64", "--dtype", dtype]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]


def test_half_precision_stays_where_it_is_the_faster_one(tiny, monkeypatch):
    monkeypatch.setattr("s3lab.tensors.meter._time_product", lambda dtype: 1.0 if dtype == torch.bfloat16 else 9.0)
    model, _ = load_model(tiny, "bfloat16")
    assert to_fast_dtype(model) == torch.bfloat16 == model.dtype


def test_prune_meets_a_budget_and_records_what_was_chosen_and_why(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    budget = ["--budget", "50%", "--cost", "weights", "--family", "*.mlp.*={n in 4..12}:16", "--family", "*=dense"]
    command = ["prune", str(tiny), *budget, "--solver", "wanda", *SMALL, "--out", str(out)]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "50.00% of weights by loss: " in told and "kept 50.0% of 6 matrices" in told
    first = (out / "model.safetensors").read_bytes()
    record = json.loads((out / "s3lab.json").read_text())
    chosen = {row["name"]: row for row in record["budget"]["rows"]}
    assert len(chosen) == 6 and record["budget"]["family"] == {"*.mlp.*": "{n in 4..12}:16", "*": "dense"}
    for row in record["matrices"]:
        own = chosen[f"model.layers.{row['layer']}.{row['name']}"]
        assert row["spec"] == own["spec"] and own["error"] == own["curve"][own["spec"]]
        assert row["density"] == pytest.approx(own["share"])
    assert "| Budget | 50.00% of weights by loss" in (out / "README.md").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (out / "budget" / "curves").rglob("*.json")}
    assert cli.main(command) == 0 and (out / "model.safetensors").read_bytes() == first
    assert kept == {path: path.stat().st_mtime_ns for path in (out / "budget" / "curves").rglob("*.json")}


def test_a_budget_and_the_run_share_moments_of_the_dense_model(tiny, tmp_path, monkeypatch):
    out, options = tmp_path / "out", ["--family", "{n in 7..9}:16", "--cost", "weights", "--hessians", "dense"]
    command = ["prune", str(tiny), "--budget", "1/2", *options, "--solver", "wanda", *SMALL, "--out", str(out)]
    monkeypatch.setattr("s3lab.models.prune.sequential.Flow", None)  # the run itself passes no text
    assert cli.main(command) == 0
    assert json.loads((out / "s3lab.json").read_text())["settings"]["moments"]


def test_prune_asks_the_loss_where_that_is_wanted(tiny, tmp_path):
    out = tmp_path / "out"
    options = ["--solver", "obd", "--hessian", "loss", "--hessians", "dense", *SMALL, "--out", str(out)]
    assert cli.main(["prune", str(tiny), "--budget", "1/2", "--family", "{n in 7..9}:16", *options]) == 0
    record = json.loads((out / "s3lab.json").read_text())
    assert record["settings"]["hessian"] == "loss" and not record["settings"]["moments"]
    told = "| Second moments | of the dense model, weighted by the dense model's loss |"
    assert told in (out / "README.md").read_text()


def test_prune_picks_the_damping_of_each_matrix_where_that_is_asked(tiny, tmp_path):
    command = ["prune", str(tiny), "--spec", "2:4", "--damp", "auto", "--refine", *SMALL]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    matrices = json.loads((tmp_path / "out" / "s3lab.json").read_text())["matrices"]
    assert all("ADMM" in row["solver"] and "Refine" in row["solver"] and row["damp"] in LADDER for row in matrices)


def test_prune_rotates_and_permutes_first_and_says_so(tiny, tmp_path):
    out = tmp_path / "out"
    command = ["prune", str(tiny), "--spec", "2:4", "--solver", "wanda", "--rotate", "hadamard", "--permute", "wanda"]
    assert cli.main([*command, *SMALL, "--out", str(out)]) == 0
    told = json.loads((out / "s3lab.json").read_text())["facts"]["provenance"]
    assert told["rotated"].startswith("hadamard: the residual stream, and the heads of 2 of 2 layers")
    assert told["permuted"].startswith("wanda: 4 inputs") and "Permuted" in (out / "README.md").read_text()
    model, _ = load_model(out)
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)


def test_a_change_of_basis_goes_with_a_budget_and_cores_and_a_run_that_was_stopped(tiny, tmp_path, monkeypatch):
    budget = ["--budget", "1/2", "--family", "*.o_proj={n in 1..3}:4", "--family", "*=dense", "--cost", "weights"]
    basis = ["--rotate", "learned", "--permute", "saliency", "--wrap", "8", "--hessians", "dense"]
    command = ["prune", str(tiny), *budget, *basis, "--solver", "wanda", *SMALL, "--out"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main([*command, str(whole)]) == 0
    record = json.loads((whole / "s3lab.json").read_text())
    chosen = {row["name"]: row["spec"] for row in record["budget"]["rows"]}
    assert {f"model.layers.{row['layer']}.{row['name']}": row["spec"] for row in record["matrices"]} == chosen
    assert record["facts"]["provenance"]["rotated"].startswith("learned: ")
    assert record["facts"]["provenance"]["permuted"].startswith("saliency: 2 inputs")
    assert record["settings"]["wrap"].startswith("Wrap(block=8")
    packed = tmp_path / "packed"
    assert cli.main(["pack", str(whole), "--out", str(packed)]) == 0
    model, _ = load_model(packed)
    assert "between blocks of 8" in repr(model.model.layers[0].self_attn.o_proj)
    assert record["settings"]["weights"] != record["budget"]["source"]["weights"]  # in another order than it was chosen

    def stop(flow, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return prune_layer(flow, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr("s3lab.models.prune.sequential.prune_layer", stop)
        assert cli.main([*command, str(stopped)]) == 130
    assert cli.main([*command, str(stopped)]) == 0
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """The folder of the random model, pruned."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    assert cli.main(["prune", str(tiny), "--spec", "2:4", "--solver", "magnitude", *SMALL, "--out", str(out)]) == 0
    return out


def test_tune_keeps_zeros_and_record_and_goes_on_where_it_was(tiny, pruned, tmp_path, capsys):
    out = tmp_path / "tuned"
    short = ["--steps", "6", "--every", "3", "--tokens", "256", "--length", "32", "--sequences", "24", "--windows", "4"]
    command = ["tune", str(pruned), *short, "--teacher", str(tiny), "--lr", "1e-3", "--out", str(out)]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "step 6: held out perplexity" in told
    before, after = (load_model(folder)[0].state_dict() for folder in (pruned, out))
    for name, W in before.items():
        assert torch.equal(W != 0, after[name] != 0) and W.dtype == after[name].dtype
        assert ("_proj" in name) != torch.equal(W, after[name]), name
    record = json.loads((out / "s3lab.json").read_text())
    assert record["matrices"] == json.loads((pruned / "s3lab.json").read_text())["matrices"]
    (tuned,) = record["tuned"]
    assert [row["step"] for row in tuned["rows"]] == [0, 3, 6] and tuned["settings"]["loss"] == ["logits"]
    assert "## Tuned" in (out / "README.md").read_text()
    weights = (out / "model.safetensors").read_bytes()
    assert cli.main(command) == 0 and capsys.readouterr().out == told
    assert (out / "model.safetensors").read_bytes() == weights
    assert cli.main(["tune", str(out), *short, "--out", str(tmp_path / "again")]) == 0
    assert len(json.loads((tmp_path / "again" / "s3lab.json").read_text())["tuned"]) == 2
    assert cli.main(["pack", str(out), "--out", str(tmp_path / "packed")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TINY", "--out", "OUT"], "s3lab.json cannot be read"),
        (["PRUNED", "--out", "PRUNED"], "is the pruned model itself"),
        (["PRUNED", "--text", "no.txt", "--out", "OUT"], "no text in 'no.txt'"),
        (["PRUNED", "--watch", "no.txt", "--out", "OUT"], "no text in 'no.txt'"),
        (["PRUNED", "--teacher", "no/model", "--out", "OUT"], "no model can be loaded"),
        (["PRUNED", "--teacher", "tiny", "--loss", "hidden", "--out", "OUT"], "the teacher has hidden_size=144"),
        (["PRUNED", "--teacher", "TINY", "--loss", "text", "--out", "OUT"], "the loss is of the text alone"),
        (["PRUNED", "--loss", "logits", "--out", "OUT"], "give the dense model"),
        (["PRUNED", "--sequences", "9999999", "--out", "OUT"], "ask for fewer"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_a_sentence_and_nothing_is_made(
    tiny, pruned, tmp_path, capsys, arguments, message
):
    names = {"TINY": str(tiny), "PRUNED": str(pruned), "OUT": str(tmp_path / "out")}
    assert cli.main(["tune", *(names.get(argument, argument) for argument in arguments)]) == 2
    told = capsys.readouterr()
    assert message in told.err and "Traceback" not in told.err and not told.out and not (tmp_path / "out").exists()


def test_eval_prints_perplexities(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The statement number {i} is executed before the others." for i in range(60)))
    assert (
        cli.main(["eval", str(tiny), "--text", str(text), "--documents", "2", "--length", "32", "--stride", "16"]) == 0
    )
    told = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["documents"] == "2" and told["stride"] == "16"
    assert float(told["word perplexity"]) > float(told["token perplexity"]) > float(told["byte perplexity"]) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "TINY", "--spec", "2;4", *SMALL, "--out", "OUT"], "cannot read the spec at column 2"),
        (["prune", "TINY", "--spec", "2:4", "--solver", "obs", *SMALL, "--out", "OUT"], "no solver is called 'obs'"),
        (["prune", "nowhere/at-all", "--spec", "2:4", *SMALL, "--out", "OUT"], "no model can be loaded"),
        (["prune", "TINY", "--spec", "2:4", "--damp", "-1", *SMALL, "--out", "OUT"], "--damp: '-1' is out of range"),
        (["prune", "TINY", "--spec", "2:4", "--calibration", "no.txt", "--out", "OUT"], "no text in 'no.txt'"),
        (["prune", "TINY", "--spec", "*.mlp=2:4", *SMALL, "--out", "OUT"], "*.mlp"),
        (["prune", "TINY", *SMALL, "--out", "OUT"], "one of the arguments --spec --budget is required"),
        (["prune", "TINY", "--spec", "2:4", "--budget", "50%", *SMALL, "--out", "OUT"], "not allowed with"),
        (["prune", "TINY", "--spec", "2:4", "--allocate", "owl", *SMALL, "--out", "OUT"], "--allocate is for a budget"),
        (["prune", "TINY", "--spec", "2:4", "--cost", "bytes", *SMALL, "--out", "OUT"], "--cost is for a budget"),
        (["prune", "TINY", "--budget", "1%", *SMALL, "--out", "OUT"], "the least of"),
        (["prune", "TINY", "--budget", "50%", "--distributed", *SMALL, "--out", "OUT"], "without --distributed"),
        (["eval", "TINY", "--text", "no.txt"], "no text in 'no.txt'"),
        (["eval", "TINY", "--length", "32", "--stride", "64"], "stride=64"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(tiny, tmp_path, capsys, arguments, message):
    names = {"TINY": str(tiny), "OUT": str(tmp_path / "out")}
    assert cli.main([names.get(argument, argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert "\ns3lab: " in f"\n{told.err}" and message in told.err and "Traceback" not in told.err and not told.out


def test_show_draws_with_its_facts_and_a_legend(capsys):
    assert cli.main(["show", "coupled-2:4", "--shape", "2x16"]) == 0
    told = capsys.readouterr().out
    assert "on 2×16: 50% kept" in told
    assert "4 scopes of 4 blocks of 2 weights" in told and "· pruned" in told and "\x1b" not in told


def test_show_draws_the_weights_of_a_coupling(capsys):
    shapes = ["--shape", "down=4x8", "--shape", "up=8×6"]
    assert cli.main(["show", "down: (M,1) & up: (1,K) follows keep 75%", *shapes]) == 0
    told = capsys.readouterr().out
    assert "down leads" in told and "up follows" in told


def test_show_lists_the_named_patterns(capsys):
    assert cli.main(["show", "--list"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{name} " in told for name in PATTERNS)


def test_show_writes_a_file(tmp_path, capsys):
    assert cli.main(["show", "2:4", "--out", str(tmp_path / "a.svg")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.svg") and (tmp_path / "a.svg").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tell a spec to show"),
        (["2;4"], "cannot read the spec at column 2"),
        (["2:4", "--shape", "8"], "--shape 8 is no shape"),
        (["2:4", "--shape", "8x16", "--shape", "8x16"], "one too many"),
        (["2:4", "--shape", "8x15"], "leaves a remainder"),
        (["2:4", "--shape", "a=8x16"], "of one weight"),
        (["2:4", "--out", "a.pdf"], "drawn as .png or .svg"),
    ],
)
def test_show_refuses_in_a_sentence(arguments, message, capsys):
    assert cli.main(["show", *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out


@pytest.mark.parametrize(
    "command", ["show", "check", "reproduce", "fetch", "prune", "tune", "eval", "pack", "unpack", "inspect"]
)
def test_every_command_tells_how_it_is_used(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0
    assert "exit status" in told if command == "check" else f"  s3lab {command} " in told.partition("examples:")[2]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_learns_to_complete(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", shell])
    told = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in told for word in ("show", "check", "reproduce", "profile", "grid"))


def test_an_interrupt_ends_with_the_shell_s_own_status(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_check", interrupt)
    assert cli.main(["check"]) == 130
    assert "interrupted" in capsys.readouterr().err
