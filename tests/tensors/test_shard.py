"""What several processes find together is what one finds alone; this file is also what each of them runs."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

import s3lab as s3
from s3lab.errors import SolveError
from s3lab.solvers.base import ScoreSolver
from s3lab.tensors.processes import ProcessGroup, assemble, find_processes
from s3lab.tensors.shard import cut

SPECS = {  # the shape, and how many of two processes share the rows
    "2:4": (13, 32, 2),
    "coupled-2:4": (12, 32, 2),
    "block16": (32, 64, 2),
    "50%/row": (5, 20, 2),
    "50%": (12, 32, 1),
    "1:3@4x2": (12, 30, 2),
    "2:4 each way": (8, 16, 2),
    "4:8@4x1 then 2:4": (8, 32, 1),
    "2:4 plus 2:16": (6, 32, 1),
}
WAYS = {
    "refit": {"solver": "sparsegpt", "refit": True},
    "refine": {"solver": "magnitude", "refine": True},
    "auto": {"solver": "wanda", "damp": "auto", "refit": True},
}


def layer(M, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * K, K, generator=generator) @ torch.randn(K, K, generator=generator)
    return torch.randn(M, K, generator=generator).double(), s3.hessian(X).double()


def solve(**options):
    """Every solver on every spec, by name; in float64, where no rounding turns a decision."""
    found = {
        f"{text} {name}": s3.prune(*layer(*SPECS[text][:2])[:1], text, layer(*SPECS[text][:2])[1], name, **options)
        for text in SPECS
        for name in s3.SOLVERS
    }
    W, H = layer(12, 32)
    H_test = s3.hessian(torch.randn(64, 32, generator=torch.Generator().manual_seed(9))).double()
    return found | {way: s3.prune(W, "2:4", H, **how, H_test=H_test, **options) for way, how in WAYS.items()}


@dataclass(frozen=True)
class Stumbling(ScoreSolver):
    """Fails in the second process: by a factorisation, until the damping is 0.1, or for good."""

    for_good: bool = False
    both: bool = False

    def score(self, problem):
        if problem.processes.rank == 0 and self.both:
            raise torch.linalg.LinAlgError("a pivot is not positive")
        if problem.processes.rank == 1 and self.for_good:
            raise SolveError("no way")
        if problem.processes.rank == 1 and problem.damp < 0.1:
            raise torch.linalg.LinAlgError("a pivot is not positive")
        problem.processes.wait()
        return problem.weight.abs()


def fail(W, H, both):
    try:
        s3.prune(W, "2:4", H, Stumbling(for_good=True, both=both), distributed=True)
    except SolveError as error:
        return str(error)


def work(out):
    """What each process does: solve all, add to a moment, stumble, and write down what came of it."""
    with assemble(True) as (processes, _):
        solutions = solve(distributed=True)
        X = torch.arange(24.0).view(8, 3) if processes.rank else torch.ones(0, 3)
        moment = s3.Moment()
        if processes.rank:
            moment.add(X)
        moment.pool(processes, torch.device("cpu"))
        W, H = layer(4, 8)
        told = {
            "stats": {name: found.stats for name, found in solutions.items()},
            "tokens": moment.tokens,
            "damp": s3.prune(W, "2:4", H, Stumbling(), distributed=True).stats["damp"],
            "failures": [fail(W, H, both) for both in (False, True)],
            "rows": processes.gather(torch.full((processes.rank + 1, 1), processes.rank)).flatten().tolist(),
            "first": processes.first(torch.tensor([processes.rank], dtype=torch.bfloat16)).item(),
        }
        tensors = {f"{name} mask": found.mask for name, found in solutions.items()}
        tensors |= {f"{name} weight": found.weight for name, found in solutions.items()}
        save_file(tensors | {"H": moment.value()}, f"{out}/{processes.rank}.safetensors")
        Path(f"{out}/{processes.rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What either of two processes wrote: tensors, and what there is to say."""
    out = tmp_path_factory.mktemp("together")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(out)]
    done = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [(load_file(out / f"{r}.safetensors"), json.loads((out / f"{r}.json").read_text())) for r in range(2)]


@pytest.fixture(scope="module")
def alone():
    return solve()


@pytest.mark.parametrize("name", [f"{text} {name}" for text in SPECS for name in s3.SOLVERS] + list(WAYS))
def test_two_processes_find_what_one_finds(alone, together, name):
    for tensors, told in together:
        assert torch.equal(tensors[f"{name} mask"], alone[name].mask)
        torch.testing.assert_close(tensors[f"{name} weight"], alone[name].weight, rtol=1e-9, atol=1e-9)
        stats = told["stats"][name]
        same = ("damp", "steps", "changes", "rho", "refit_steps", "sweeps", "exchanges", "processes")
        counted = {key: stats[key] for key in same if key in stats}
        text = name.removesuffix(f" {name.split()[-1]}")
        expected = {"processes": SPECS[text][2] if text in SPECS else 2} | alone[name].stats
        assert counted == pytest.approx({key: expected[key] for key in counted})


def test_both_have_the_same_bits(together):
    (one, _), (other, _) = together
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_moment_is_that_of_all_tokens_wherever_they_were_seen(together):
    X = torch.arange(24.0).view(8, 3)
    for tensors, told in together:
        assert told["tokens"] == 8 and torch.equal(tensors["H"], s3.hessian(X))


def test_a_factorisation_that_fails_in_one_process_raises_the_damping_of_all(together):
    assert [told["damp"] for _, told in together] == [0.1, 0.1]


def test_an_error_in_one_process_ends_all_even_where_another_would_try_again(together):
    assert [told["failures"] for _, told in together] == [
        ["process 1 of 2 could not go on: its own error says why"] * 2,
        ["no way"] * 2,
    ]


def test_rows_are_gathered_in_order_and_the_first_has_the_say(together):
    assert all(told["rows"] == [0, 1, 1] and told["first"] == 0 for _, told in together)


class Seat(ProcessGroup):
    """A place in a group of which nobody else is there."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def components(part):
    """The rows that scopes tie together, as sets, by merging scope by scope."""
    found = [{row} for row in range(part.shape[0])]
    for scope in (part.stage(torch.zeros(1)).offsets // part.shape[1]).flatten(1).tolist():
        tied = set(scope)
        inside = [rows for rows in found if rows & tied]
        found = [rows for rows in found if not rows & tied] + [set().union(*inside)]
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "text", [*SPECS, "25%/column", "(K,M):(1,K) / (1,1) / (1,4) keep 1", "(M*K):(1) / (6) / (4) keep 3"]
)
def test_shares_are_all_scopes_each_once_with_no_row_in_two(text, size):
    M, K = (12, 20) if "(6)" in text else (SPECS[text][:2] if text in SPECS else (12, 32))
    bound = s3.parse(text).bind((M, K))
    problem = s3.Problem(torch.arange(float(M * K)).view(M, K), torch.eye(K))
    shares = [cut(problem, bound, Seat(rank, size)) for rank in range(size)]
    if not isinstance(bound, s3.Partition) or len(components(bound)) < size:
        assert shares == [None] * size
        return
    assert sorted(row for share in shares for row in share.rows.tolist()) == list(range(M))
    counts = [len(share.rows) for share in shares]
    assert max(counts) - min(counts) <= max(map(len, components(bound)))
    blocks = torch.cat([share.stage.blocks(share.problem.W) for share in shares])  # the weights are their own offsets
    expected = bound.stage(problem.W).offsets
    assert sorted(blocks.long().tolist()) == sorted(expected.tolist())
    assert all((share.stage.goes == bound.B - bound.keep).all() for share in shares)


def test_what_is_asked_of_all_processes_needs_some():
    with pytest.raises(SolveError, match="torchrun"):
        find_processes(True)
    with pytest.raises(SolveError, match="RANK"), assemble(True):
        pass
    with pytest.raises(SolveError, match="torchrun"):
        s3.prune(torch.ones(4, 8), "2:4", torch.eye(8), distributed=True)


def test_a_process_alone_is_its_own_team():
    assert not distributed.is_initialized()
    found = [
        s3.prune(*layer(4, 8)[:1], "2:4", layer(4, 8)[1], distributed=processes)
        for processes in (False, ProcessGroup())
    ]
    assert torch.equal(found[0].weight, found[1].weight) and "processes" not in found[0].stats


if __name__ == "__main__":
    work(sys.argv[1])
