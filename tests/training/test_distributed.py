"""Two processes under DistributedDataParallel train as one does; this file is also what each of them runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import s3lab as s3
from s3lab.training import METHODS

QUICK = {"gradual": s3.Gradual(steps=4, every=1), "rigl": s3.RigL(steps=8, every=2), "proximal": s3.Proximal(0.5)}
BATCH, STEPS = 8, 7


def train(name, rank=0, size=1):
    """Train a small network in float64, where no rounding turns a decision, on a share of each batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).double()
    sparsity = s3.sparse(model, {"0": "2:4", "2": "25%/row"}, QUICK.get(name, name))
    whole = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    sparsity.follow(optimizer)
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        X, Y = (torch.randn(BATCH, 16, generator=generator, dtype=torch.float64).chunk(size)[rank] for _ in range(2))
        optimizer.zero_grad()
        (whole(X) - Y).square().mean().backward()
        optimizer.step()
        sparsity.check()
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items()}


def work(out):
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    for name in METHODS:
        save_file(train(name, rank, size), out / f"{name}-{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that two processes have written to."""
    out = tmp_path_factory.mktemp("together")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(out)]
    done = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_does(out, name):
    alone = train(name)
    one, other = (load_file(out / f"{name}-{rank}.safetensors") for rank in range(2))
    assert one.keys() == other.keys() == alone.keys()
    for key, tensor in alone.items():
        assert torch.equal(one[key], other[key]), key
        if tensor.is_floating_point():
            torch.testing.assert_close(one[key], tensor, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(one[key], tensor), key


if __name__ == "__main__":
    work(Path(sys.argv[1]))
