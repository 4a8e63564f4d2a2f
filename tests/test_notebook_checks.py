"""The check cell of a notebook prints False on a wrong result: each of its lines is fed one."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch

import s3lab as s3
from s3lab.lab import checks, record

ROOT = Path(__file__).parents[1]
Names = dict[str, Any]


def code(name: str) -> list:
    (path,) = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def run_check(name: str, names: Names) -> dict[str, bool]:
    """What a notebook's check cell prints about some results, by its labels."""
    (check,) = (cell.source for cell in code(name) if "keep_output" in cell.metadata.get("tags", []))
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(check, dict(names))
    lines = [line.rpartition(": ") for line in told.getvalue().splitlines()]
    return {label: {"True": True, "False": False}[value] for label, _, value in lines}


def errors(rows: dict[str, list[float]], index: str, value: str, columns: str = "solver") -> pd.DataFrame:
    """A table of errors as notebooks make them, by what each row is of and by a list over ``rows``."""
    names, *lists = list(rows.items())
    solvers = names[1]
    return pd.DataFrame(
        [{index: key, columns: s, value: v} for key, values in lists for s, v in zip(solvers, values, strict=True)]
    )


def patterns() -> Names:
    W = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    bound = {name: s3.parse(name).bind((32, 32)) for name in ("2:4", "block16", "50%/row")}
    masks = {name: part.project(W) for name, part in bound.items()}
    return {"s3": s3, "checks": checks, "bound": bound, "masks": masks, "rows": 32, "columns": 32}


def other_mask(names: Names) -> None:
    names["masks"]["2:4"] = names["masks"]["50%/row"]


def fuller_mask(names: Names) -> None:
    names["masks"]["block16"] = torch.ones(32, 32).bool()


def other_reading(names: Names) -> None:
    names["s3"] = SimpleNamespace(parse=lambda text: object())


def layer_by_layer() -> Names:
    matrices = pd.DataFrame({"error_test": [0.1, 0.2], "density": [0.5, 0.5]})
    return {"matrices": matrices, "layers": pd.DataFrame({"perplexity": [55.0, 56.0]}), "dense": 54.0}


def tour() -> Names:
    price = {"2:4": 9.0, "4:8": 8.0, "8:16": 7.0, "16:32": 6.0, "50%": 5.0}
    price |= {"blocks4": 12.0, "blocks16": 15.0, "transposable-2:4": 11.0}
    rows = {"": ["obd", "sobs"], **{name: [2 * value, value] for name, value in price.items()}}
    names = patterns()
    solved = {(name, "sobs"): SimpleNamespace(mask=mask) for name, mask in names["masks"].items()}
    return names | {"table": errors(rows, "pattern", "error_percent"), "solvers": ["obd", "sobs"], "solved": solved}


def dearer(pattern: str, by: float, solver: str = "sobs") -> Callable[[Names], None]:
    def change(names: Names) -> None:
        table = names["table"]
        table.loc[(table["pattern"] == pattern) & (table["solver"] == solver), "error_percent"] *= by

    return change


def broken(names: Names) -> None:
    names["solved"]["2:4", "sobs"].mask = names["masks"]["50%/row"]


def inputs() -> Names:
    act = pd.Series([9.0, 7.0, 5.0, 4.0, 3.0])
    grid = pd.DataFrame({"correction": ["none", "R-Sparse", "R-Sparse"], "gain_percent": [0.0, 1.0, 2.0]})
    return {"act": act, "grid": grid, "gains": pd.DataFrame({"correction": ["R-Sparse"], "low": [0.1]})}


def from_nothing() -> Names:
    runs = [("dense", "dense"), ("2:4", "ste"), ("2:4", "static")]
    lows = {"ste": 0.1, "static": 0.0, "dense": 0.0}
    common = {"equal": "steps", "seed": 0}
    rows = pd.DataFrame(
        [
            {**common, "pattern": p, "method": m, "step": step, "perplexity": 400.0 / step, "churn": lows[m] / step}
            for p, m in runs
            for step in (1, 2)
        ]
    )
    names: Names = {"rows": rows, "last": rows[rows["step"] == 2], "found": runs, "seeds": [0], "equal": ["steps"]}
    names |= {"patterns": ["2:4"], "methods": ["ste", "static"], "pairs": runs[1:]}
    return names | {"moving": rows[rows["method"] == "ste"].assign(panel="2:4"), "scratch": SimpleNamespace(cost=cost)}


def cost(pattern: str, method: str) -> float:
    return 0.5


def recovery() -> Names:
    index = pd.MultiIndex.from_product([["2:4, admm"], ["fixed", "spp", "lora"]], names=["model", "method"])
    summary = pd.DataFrame({"trained": [9, 2, 3], "own_change_percent": [-5.0, -1.0, 0.0]}, index=index)
    table = pd.DataFrame({"own_perplexity": [10.0, *[20.0] * 6]})
    names: Names = {"pruned": table.iloc[1:], "table": table, "summary": summary, "columns": ["own_perplexity"]}
    names |= {"patterns": ["2:4"], "solvers": ["admm"], "rates": dict.fromkeys(("fixed", "spp", "lora"))}
    return names | {"texts": {"own": ""}, "steps": 4, "every": 4}


def put(name: str, place: tuple, value: Any) -> Callable[[Names], None]:
    def change(names: Names) -> None:
        if isinstance(names[name], pd.Series | pd.DataFrame):
            names[name].loc[place] = value
        else:
            names[name] = value

    return change


RIGHT: dict[str, Callable[[], Names]] = {
    "01": patterns,
    "03": layer_by_layer,
    "06": tour,
    "11": inputs,
    "13": from_nothing,
    "14": recovery,
}
WRONG = [
    ("01", "every mask satisfies its spec", other_mask),
    ("01", "S·B·E is the weight", put("rows", (), 31)),
    ("01", "kept share is the density", fuller_mask),
    ("01", "one sentence each", other_reading),
    ("03", "every matrix has a held-out error", put("matrices", (1, "error_test"), None)),
    ("03", "half of the weights are kept", put("matrices", (0, "density"), 0.6)),
    ("03", "pruning costs perplexity, less than doubling it", put("layers", (1, "perplexity"), 120.0)),
    ("06", "every mask satisfies its spec", broken),
    ("06", "the better solver wins on every pattern", dearer("blocks16", 0.1, "obd")),
    ("06", "wider scopes cost less", dearer("8:16", 2.0)),
    ("06", "larger blocks cost more", dearer("blocks4", 2.0)),
    ("06", "both ways costs more than one", dearer("transposable-2:4", 0.5)),
    ("11", "inputs, 2:4 > 4:8 > 8:16 > 16:32 > unstructured", put("act", (2,), 7.0)),
    ("11", "a low-rank residual gains on every pattern", put("grid", (2, "gain_percent"), -0.1)),
    ("11", "its interval over the seeds lies above zero", put("gains", (0, "low"), -0.1)),
    ("13", "every run is there", put("seeds", (), [0, 1])),
    ("13", "every model learns", put("rows", (slice(0, 1), "perplexity"), 500.0)),
    ("13", "masks move less at the end than at first", put("moving", (3, "churn"), 0.9)),
    ("13", "masks that are given or nested take nothing in", put("rows", (5, "churn"), 0.1)),
    ("13", "sparse steps cost less", put("scratch", (), SimpleNamespace(cost=lambda *_: 1.0))),
    ("14", "every row is there", put("steps", (), 8)),
    ("14", "all kept weights learn the most numbers", put("summary", (("2:4, admm", "lora"), "trained"), 9)),
    ("14", "the dense model is the best", put("table", (3, "own_perplexity"), 9.0)),
    (
        "14",
        "tuning all kept weights lowers the perplexity of its text",
        put("summary", (("2:4, admm", "fixed"), "own_change_percent"), 0.1),
    ),
]


@pytest.mark.parametrize("name", RIGHT)
def test_right_results_pass_and_every_line_is_fed_a_wrong_one(name):
    told = run_check(name, RIGHT[name]())
    assert all(told.values())
    assert told.keys() == {label for notebook, label, _ in WRONG if notebook == name}


@pytest.mark.parametrize(("name", "label", "change"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_result_prints_false(name, label, change):
    names = RIGHT[name]()
    change(names)
    assert not run_check(name, names)[label]


@pytest.mark.parametrize("name", [path.name[:2] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))])
def test_nothing_is_claimed_by_an_error_alone(name):
    """A check that raises says nothing of the others, and one that only prints can't be False."""
    (check,) = (cell for cell in code(name) if "keep_output" in cell.metadata.get("tags", []))
    assert ".check(" not in check.source
    for line in check.source.splitlines():
        assert not line.startswith("print(") or not line.rstrip().endswith('")'), line


def compare_models(folder: Path) -> tuple[dict[str, bool], str]:
    """Run notebook 04 on the tables of a folder up to its Table 2, and its check."""
    names: Names = {"tables": str(folder)}
    cells = [cell.source for cell in code("04")]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        for source in cells[:3]:
            exec(source.replace("tables = None", f"tables = {str(folder)!r}"), names)
    return run_check("04", names), told.getvalue()


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("S3LAB_FIGURES", str(tmp_path / "made"))
    for path in (ROOT / "figures").glob("prune_*.csv"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_worse_solver_turns_what_compares_models_false(tables):
    right, told = compare_models(tables)
    assert all(right.values())
    assert told.startswith("stored, made at another commit: prune_magnitude_layers.csv prune_wanda_layers.csv")
    path = tables / "prune_sobs_layers.csv"
    worse = pd.read_csv(path)
    worse["perplexity"] *= 1.1
    worse.to_csv(path, index=False)
    assert not any(compare_models(tables)[0].values())


def test_tables_that_were_run_are_told_from_stored_ones(tables):
    made = tables / "prune_sobs_layers.json"
    for told, fresh in (({"commit": "0" * 40}, False), (record.commit(), True)):
        made.write_text(json.dumps(told))
        assert record.is_fresh(made.with_suffix(".csv")) is fresh
        assert ("sobs" not in compare_models(tables)[1]) is fresh
