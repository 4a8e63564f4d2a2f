"""A run that is killed, or cannot write, at any operation on a file goes on to the same bits, and leaves no trace."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUIET = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def try_all(step):
    with TemporaryDirectory() as home:
        Path(home).chmod(0o755)  # for the user who is not root
        command = [sys.executable, str(HERE / "kills.py"), home, str(step)]
        done = subprocess.run(command, env=QUIET, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("transformers")
    return try_all(step=101)


@pytest.mark.parametrize("kind", ["kills", "full", "read-only", "held"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(found, kind):
    assert found["operations"] > 100 and found[kind]
    assert not [tried for tried in found[kind] if tried["wrong"]]


@pytest.mark.slow
def test_so_it_is_at_every_operation():
    found = try_all(step=1)
    assert len({tried["at"] for tried in found["kills"]}) == found["operations"]
    assert not [tried for kind in ("kills", "full", "read-only", "held") for tried in found[kind] if tried["wrong"]]


MAKES = """
from s3lab.lab.run import record
import pandas
run = record.start("01_make_table", {"size": size})
run.table(pandas.DataFrame({"size": [size]}), "made")
"""


@pytest.fixture
def house(tmp_path):
    """A repository of one notebook that makes a table and its record."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    cells = [new_code_cell("size = 7", metadata={"tags": ["parameters"]}), new_code_cell(MAKES)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "01_make_table.ipynb")
    (tmp_path / "notebooks" / "profiles" / "quick.yaml").write_text("01_make_table:\n")
    return tmp_path


def reproduce(house, out, at):
    """Reproduce all, in as many processes as that takes, of which the one that comes to operation ``at`` dies."""
    hook = {"COUNT_ROOT": str(out), "COUNT_TALLY": f"{out}.tally", "COUNT_AT": str(at)}
    env = {**QUIET, **hook, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    program = "from s3lab.lab.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "reproduce", "--out", str(out)]
    return subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, check=False)


def read_all(out):
    """The tables and records of a folder, without times, which must all be whole, and what is left of parts."""
    assert not [path for path in out.rglob("*.part")]
    record = json.loads((out / "made.json").read_text())
    nbformat.read(out / "runs" / "01_make_table.ipynb", as_version=4)
    return (out / "made.csv").read_bytes(), record["sha256"], record["run"]["made"], record["parameters"]


def check_reproduce(house, at):
    """Kill a run at an operation, go on, and return what it has then."""
    out = house / f"killed-{at}"
    killed = reproduce(house, out, at)
    assert killed.returncode in (-signal.SIGKILL, 1), (at, killed.stderr)  # 1 where it was a notebook's own process
    again = reproduce(house, out, -1)
    assert again.returncode == 0, (at, again.stdout, again.stderr)
    return read_all(out)


@pytest.mark.slow
def test_reproducing_goes_on_after_a_kill_at_every_operation(house):
    whole = reproduce(house, house / "whole", at=-1)
    assert whole.returncode == 0, whole.stderr
    made, _, run, parameters = read_all(house / "whole")
    assert made == b"size\n7\n" and run == ["made"] and parameters == {"size": 7}
    operations = Path(f"{house / 'whole'}.tally").read_text().split()
    assert len(operations) > 30
    for at in range(len(operations)):
        assert check_reproduce(house, at) == read_all(house / "whole"), (at, operations[at])
