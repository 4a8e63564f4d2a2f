"""Every option with values that cannot be, every path where it cannot be: one sentence, exit status 2, nothing made."""

from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from s3lab.lab import arguments, cli
from s3lab.lab.options import make_parser

ODD = ["", "x", "٣", "²", "1_0", "1e3", "9" * 5000, " 8"]
BAD = {
    arguments.count: [*ODD, "0", "-3", "1.5", "nan"],
    arguments.seed: [*ODD, "-1", "1.5", "9" * 19],
    arguments.share: ["", "x", "1", "-0.1", "nan", "inf", "9" * 5000],
    arguments.rate: ["", "x", "0", "-1", "nan", "inf", "1e-999"],
    arguments.damping: ["", "x", "-1", "nan", "inf", "-inf", "Auto"],
    arguments.device: ["", "foo", "meta", "cuda:", "cuda:x", "cuda:99", "cpu:1", "cpu:٣", "cuda:-1"]
    + ["cuda"] * (not torch.cuda.is_available()),
    arguments.path: ["", "a\0b", "\udcff"],
    "choice": ["", "foo", "int8", "0"],
    # texts of forms of their own, each with a command that can be run as far as where they are read
    "--spec": [
        "",
        "2;4",
        "*=",
        "*.mlp=²:4",
        "(" * 3000,
        "2:4" + " then 2:4" * 500,
        "9" * 5000 + ":4",
        "no-name keep 1",
    ],
    "--solver": ["", "obs", "*=obs"],
    arguments.budget: [*ODD[:-1], "0", "0%", "-5%", "150%", "nan", "inf", "1/0", "9" * 5000 + "%", "%"],
    "--family": ["", "2:4", "{n}:{n}", "{n};16", "{n in 4..}:16", "*=", "*={q}%", "{" * 3000, "no-name keep {p}%"],
    "--set": ["", "seed", "=1", "seed=", "no-name=1"],
    "--grid": ["", "seed", "=1", "seed=1,1"],
    "--shape": [
        "",
        "8",
        "8x",
        "x8",
        "0x8",
        "-8x8",
        "²x8",
        "8x٣",
        "8x16x2",
        "a=8x16",
        "9" * 5000 + "x8",
        "99999999x99999999",
    ],
}
FREE = {"--tasks", "names", "spec"}  # told apart by lm_eval, the plan and the parser, whose tests are elsewhere
NEEDS = {
    "prune": ["reference", "--spec", "2:4", "--out", "OUT"],
    "tune": ["DIR", "--out", "OUT"],
    "eval": ["reference"],
    "reproduce": ["--out", "OUT"],
    "show": ["2:4"],
    "check": [],
    "fetch": ["smollm2"],
    "pack": ["DIR", "--out", "OUT"],
    "unpack": ["DIR", "--out", "OUT"],
    "inspect": ["DIR"],
}
BUDGET = ["reference", "--budget", "50%", "--out", "OUT"]
OTHERS = {"--budget": ["reference", "--out", "OUT"], "--family": BUDGET, "--allocate": BUDGET, "--cost": BUDGET}


def find_options():
    """Every argument of every command that takes a value, with the values that it must refuse."""
    commands = next(
        action for action in make_parser(defaultdict(lambda: print))._actions if isinstance(action.choices, dict)
    )
    for command, parser in commands.choices.items():
        for action in parser._actions:
            name = (action.option_strings or [action.dest])[-1]
            if action.nargs != 0 and name not in FREE:
                kind = "choice" if action.choices else action.type or name
                yield from ((command, name, value) for value in BAD[kind])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments, capsys, here):
    """Run a command that must refuse, and return its sentence."""
    before = sorted(here.rglob("*"))
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    said = told.err.splitlines()[-1 if told.err.startswith("\r") else 0]
    assert "Traceback" not in told.err and not told.out
    assert sorted(here.rglob("*")) == before
    return said


def test_every_value_that_cannot_be_is_refused_before_anything_is_loaded_or_made(here, capsys, monkeypatch):
    monkeypatch.setattr("s3lab.models.text.pretrained.load_model", None)  # whoever loads a model fails
    (here / "notebooks" / "profiles").mkdir(parents=True)
    (here / "notebooks" / "profiles" / "quick.yaml").write_text("01_one:\n")
    first = new_code_cell("seed = 0", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[first]), here / "notebooks" / "01_one.ipynb")
    tried = list(find_options())
    assert len(tried) > 200
    for command, name, value in tried:
        needs = OTHERS.get(name, NEEDS[command])
        if not name.startswith("-"):
            given = [command, value, *needs[1:]]
        else:
            given = (
                [command, *needs, name, value] if not value.startswith("-") else [command, *needs, f"{name}={value}"]
            )
        assert run(given, capsys, here).startswith("s3lab: "), (command, name, value[:50])


@pytest.fixture
def places(here):
    """Places where no file or folder can be, by what they are."""
    (here / "file").write_bytes(b"\xff\x00")
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "README.md").write_text("mine")
    (here / "folder.svg").mkdir()
    (here / "folder.yaml").mkdir()
    (here / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    (here / "deep.yaml").write_text("[" * 20_000)
    (here / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    return {"LONG": "n" * 300, "THROUGH": str(Path("file") / "inside")}


TEXT = ["prune", "tiny", "--spec", "2:4", "--out", "new"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "2:4", "--out", "folder.svg"], "folder.svg"),
        (["show", "2:4", "--out", "THROUGH.svg"], "file"),
        (["show", "2:4", "--out", "LONG.svg"], "too long"),
        (["reproduce", "--out", "file"], "notebooks"),
        (["reproduce", "--profile", "folder.yaml"], "notebooks"),
        (["prune", "tiny", "--spec", "2:4", "--out", "file"], "'file' is a file"),
        (["prune", "tiny", "--spec", "2:4", "--out", "THROUGH"], "Not a directory"),
        (["prune", "tiny", "--spec", "2:4", "--out", "LONG"], "too long"),
        (["prune", "tiny", "--spec", "2:4", "--out", "full"], "did not make (README.md)"),
        (["prune", "tiny", "--spec", "2:4", "--out", "."], "did not make"),
        (["prune", "empty", "--spec", "2:4", "--out", "new"], "there is no config.json in it"),
        (["prune", "file", "--spec", "2:4", "--out", "new/in/new"], "no model can be loaded from 'file'"),
        (["prune", "LONG", "--spec", "2:4", "--out", "new"], "too long"),
        ([*TEXT, "--calibration", "missing"], "no text in 'missing'"),
        ([*TEXT, "--calibration", "empty"], "no text in 'empty'"),
        ([*TEXT, "--calibration", "bytes.txt"], "not UTF-8"),
        ([*TEXT, "--calibration", "LONG"], "too long"),
        (["eval", "empty"], "there is no config.json in it"),
        (["eval", "missing"], "no model can be loaded"),
        (["eval", "tiny", "--text", "empty"], "no text in 'empty'"),
        (["eval", "tiny", "--text", "bytes.txt"], "not UTF-8"),
    ],
)
def test_every_path_where_it_cannot_be_is_told(places, here, capsys, arguments, message):
    given = [
        next((text.replace(name, path) for name, path in places.items() if name in text), text) for text in arguments
    ]
    assert message in run(given, capsys, here)


@pytest.mark.parametrize(("profile", "message"), [("folder", "not there"), ("bytes", "not YAML"), ("deep", "not YAML")])
def test_a_profile_that_is_none_is_told(places, here, capsys, profile, message):
    (here / "notebooks").mkdir()
    (here / "notebooks" / "01_a.ipynb").write_text("{}")
    assert message in run(["reproduce", "--profile", f"{profile}.yaml"], capsys, here)
