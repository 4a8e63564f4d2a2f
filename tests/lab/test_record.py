import hashlib
import json
import subprocess

import pandas as pd
import pytest
from matplotlib.figure import Figure

from s3lab.errors import DataError
from s3lab.files import write
from s3lab.lab.draw import plot
from s3lab.lab.run import record

TABLE = pd.DataFrame({"solver": ["obd", "sobs"], "error": [0.2, 0.1]})


@pytest.fixture
def run(tmp_path):
    return record.start("00_example", {"seed": 3, "device": "cpu"}, tmp_path)


def drawing() -> Figure:
    return plot.curves(pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]}), "step", "loss")


def test_a_table_comes_back_as_it_went(run, tmp_path):
    assert run.table(TABLE, "errors") is TABLE
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "errors.csv"), TABLE)


def test_the_record_says_how_it_was_made(run, tmp_path):
    run.note(solvers=["SOBS(batch=64)"])
    run.table(TABLE, "errors")
    found = json.loads((tmp_path / "errors.json").read_text())
    assert found["notebook"] == "notebooks/00_example.ipynb"
    assert found["parameters"] == {"seed": 3, "device": "cpu"} and found["seeds"] == {"seed": 3}
    assert found["solvers"] == ["SOBS(batch=64)"]
    assert found["sha256"] == {"errors.csv": hashlib.sha256((tmp_path / "errors.csv").read_bytes()).hexdigest()}
    assert {"python", "s3lab", "torch", "numpy"} <= found["versions"].keys()
    assert found["time_s"] >= 0 and found["device"]


def test_a_note_reaches_records_already_written(run, tmp_path):
    run.table(TABLE, "errors")
    run.note(tokens=12)
    assert json.loads((tmp_path / "errors.json").read_text())["tokens"] == 12


def test_table_and_figure_of_one_name_share_a_record(run, tmp_path):
    run.table(TABLE, "errors")
    run.figure(drawing(), "errors")
    assert json.loads((tmp_path / "errors.json").read_text())["sha256"].keys() == {
        "errors.csv",
        "errors.png",
        "errors.svg",
    }
    assert {path.name for path in tmp_path.iterdir()} == {f"errors.{end}" for end in ("csv", "json", "png", "svg")}


def test_a_figure_is_the_same_to_the_byte_every_time(run, tmp_path):
    files = [tmp_path / "loss.png", tmp_path / "loss.svg"]
    run.figure(drawing(), "loss")
    first = [path.read_bytes() for path in files]
    run.figure(drawing(), "loss")
    assert [path.read_bytes() for path in files] == first


def test_a_notebook_shows_a_figure_at_the_size_of_its_print(run):
    data, display = run.figure(drawing(), "loss")._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert display == {"width": round(plot.COLUMN * 110)}


@pytest.mark.parametrize("name", ["a/b", "../a", "", "a b"])
def test_a_name_is_no_path(run, name):
    with pytest.raises(DataError, match="cannot name"):
        run.table(TABLE, name)


def test_the_folder_is_beside_the_notebooks_unless_told_otherwise(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.delenv(record.FIGURES)
    for here in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(here)
        assert record.start("00_example", {}).folder == tmp_path / "figures"
    monkeypatch.setenv(record.FIGURES, str(tmp_path / "elsewhere"))
    assert record.start("00_example", {}).folder == tmp_path / "elsewhere"
    assert record.start("00_example", {}, tmp_path / "here").folder == tmp_path / "here"


def test_commit_sees_changes_but_not_those_of_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == {"commit": None, "dirty": None}
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    write(tmp_path / "figures" / "a.csv", b"")
    assert record.commit() == {"commit": head, "dirty": False}
    write(tmp_path / "code.py", b"")
    assert record.commit() == {"commit": head, "dirty": True}
