"""A model pruned by several processes is the model pruned by one; this file is also what each of them runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3lab.errors import DataError, S3Error
from s3lab.lab import cli
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.sequential import prune_model
from s3lab.models.structure.decoder import find_decoder
from s3lab.tensors.processes import ProcessGroup, assemble

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 48}
RUNS = {
    "admm": ("Qwen3", {"spec": "2:4", "solver": "admm"}),
    "mixed": ("Qwen3", {"spec": ["mlp-channels keep 50%", "50%/row"], "solver": "sobs", "hessians": "dense"}),
    "loss": ("Qwen3", {"spec": "50%", "solver": "obd", "hessian": "loss"}),
    "experts": ("Qwen3Moe", {"spec": "2:4", "solver": "sparsegpt", "min_tokens": 40, "held_out": 0.0}),
}


def make(family, seed=0):
    """A tiny random model, in float64, where no rounding turns a decision, and twelve sequences."""
    config = getattr(transformers, f"{family}Config")(**SIZES | (EXPERTS if family == "Qwen3Moe" else {}))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    for parameter in model.parameters():  # as drawn, every matrix is far too small to matter
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def ids():
    return torch.randint(3, 64, (12, 16), generator=torch.Generator().manual_seed(1))


def prune(name, seed=0, **options):
    family, recipe = RUNS[name]
    model = make(family, seed)
    return prune_model(model, None, calibration=ids(), **{"batch": 3, "progress": False} | recipe | options)


def matrices(run):
    found = find_decoder(run.model).matrices
    return {name: matrix.weight.contiguous() for layer in found for name, matrix in layer.items()}


def alike(row, like):
    """Whether the figures of two runs, times and memory aside, are those of one to rounding."""
    assert row.keys() == like.keys()
    near = {key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for key, value in like.items()}
    return all(row[key] == near[key] for key in row.keys() - {"time_s", "mem_mib"})


class Stop(Exception):
    pass


def stop_in_second_layer(step):
    if step.solved == 9:
        raise Stop


def attempt(**options):
    try:
        prune("admm", **options)
    except (S3Error, Stop) as error:
        return f"{type(error).__name__}: {error}"


def work(out):
    """What each process does: runs, one that is broken off and taken up again, and what cannot be."""
    with assemble(True) as (processes, _):
        runs = {name: prune(name, distributed=processes) for name in RUNS}
        told = {"broken": attempt(distributed=processes, out=out / "run", progress=stop_in_second_layer)}
        if processes.rank == 0:
            shutil.copytree(out / "run", out / "alone")
        processes.wait()
        seen = []
        runs["resumed"] = prune("admm", distributed=processes, out=out / "run", progress=seen.append)
        told |= {
            "seen": [(step.layer, step.solved) for step in seen],
            "unlike": attempt(distributed=processes, seed=processes.rank),
            "elsewhere": attempt(distributed=processes, out=out / "run", spec="1:4"),
            "rows": {name: run.matrices for name, run in runs.items()},
            "layers": {name: run.layers for name, run in runs.items()},
        }
        for name, run in runs.items():
            save_file(matrices(run), out / f"{name}-{processes.rank}.safetensors")
        (out / f"{processes.rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that two processes have written to."""
    out = tmp_path_factory.mktemp("together")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(out)]
    done = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def told(out, rank):
    return json.loads((out / f"{rank}.json").read_text())


@pytest.fixture(scope="module")
def alone():
    return {name: prune(name) for name in RUNS}


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_two_processes_prune_a_model_as_one_does(alone, out, name):
    expected = alone["admm" if name == "resumed" else name]
    one, other = (load_file(out / f"{name}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(one[matrix], other[matrix]) for matrix in one)
    for matrix, W in matrices(expected).items():
        assert torch.equal(one[matrix] != 0, W != 0)
        torch.testing.assert_close(one[matrix], W, rtol=1e-6, atol=1e-6)  # second moments are kept in float32
    for rank in range(2):
        figures = told(out, rank)
        for row, like in zip(figures["rows"][name], expected.matrices, strict=True):
            assert alike(row, like)
        for row, like in zip(figures["layers"][name], expected.layers, strict=True):
            assert alike(row, like)


def test_an_expert_has_the_tokens_that_it_met_in_all_processes(alone):
    """Two processes leave dense what one does: some experts, though in half of the sequences no expert met enough."""
    experts = [row for row in alone["experts"].matrices if "expert" in row["name"]]
    assert {"left dense" in row["note"] for row in experts} == {True, False}
    assert any(40 <= row["tokens"] < 80 for row in experts)


def test_a_run_broken_off_in_one_process_ends_in_all_and_goes_on_with_any_number(alone, out):
    assert [told(out, rank)["broken"].split(":")[0] for rank in range(2)] == ["Stop", "SolveError"]
    assert [told(out, rank)["seen"] for rank in range(2)] == [[[1, solved] for solved in range(8, 15)], []]
    seen = []
    run = prune("admm", out=out / "alone", progress=seen.append)
    assert {step.layer for step in seen} == {1} and not run.damaged
    for name, W in matrices(run).items():
        torch.testing.assert_close(W, matrices(alone["admm"])[name], rtol=1e-6, atol=1e-6)
    assert sorted(path.name for path in (out / "run").glob("[!.]*")) == ["layers", "manifest.json"]


def test_processes_that_were_not_given_the_same_are_told_so(out):
    for rank in range(2):
        assert told(out, rank)["unlike"].startswith("DataError: the processes have different models")
        assert told(out, rank)["elsewhere"].startswith("DataError" if rank == 0 else "SolveError: process 0 of 2")


def test_every_process_needs_a_chunk():
    processes = ProcessGroup()
    processes.size = 5
    model = make("Qwen3")
    with pytest.raises(DataError, match="4 chunks of sequences for 5 processes: lower batch"):
        Flow(model, find_decoder(model), cut_chunks(ids(), 0.0, 3, 0), torch.device("cpu"), processes=processes)


def test_the_command_line_asks_for_torchrun(tmp_path, capsys):
    pruning = ["prune", "reference", "--spec", "2:4", "--out", str(tmp_path / "out"), "--distributed"]
    assert cli.main(pruning) == 2
    assert "torchrun" in capsys.readouterr().err and not list(tmp_path.iterdir())


if __name__ == "__main__":
    work(Path(sys.argv[1]))
