"""The check cell of a notebook tells a wrong result from a right one: each of its lines is fed one of each."""

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
from s3lab.lab.run import record
from s3lab.lab.study import checks

ROOT = Path(__file__).parents[1]
Names = dict[str, Any]


def code(name: str) -> list:
    (path,) = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def find_check(name: str) -> Any:
    (check,) = (cell for cell in code(name) if "keep_output" in cell.metadata.get("tags", []))
    return check


def by_label(text: str) -> dict[str, str]:
    return {label: value for label, _, value in (line.rpartition(": ") for line in text.splitlines())}


def run_check(name: str, names: Names) -> dict[str, str]:
    """What a notebook's check cell prints about some results, by its labels."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(find_check(name).source, dict(names))
    return by_label(told.getvalue())


def stored(name: str) -> dict[str, str]:
    """What it is committed to print."""
    return by_label("".join(output["text"] for output in find_check(name).outputs))


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


def training() -> Names:
    paragraphs = SimpleNamespace(SPLITS=["train", "test"], text=lambda split: split, paragraphs=lambda text: [text])
    table = pd.DataFrame({"model": "toy", "split": "held-out", "perplexity": [500.0, 300.0]})
    return {"table": table, "size": "toy", "corpus": paragraphs, "perplexity": 50.0, "unigram": 900.0}


def repeated(names: Names) -> None:
    names["corpus"].paragraphs = lambda text: ["the same"]


def one_layer() -> Names:
    solvers = ["magnitude", "obd", "sparsegpt", "sobs", "admm"]
    rows = [
        {"layer": "up", "pattern": p, "solver": s, "error_percent": e, "error_test_percent": e + 1, "damp": 0.01}
        for p in ("2:4", "8:16")
        for s, e in zip(solvers, (40.0, 30.0, 20.0, 15.0, 14.0), strict=True)
    ]
    return {"table": pd.DataFrame(rows)}


def calibration() -> Names:
    held = {(0.001, 1): (9.0, 5.0), (0.001, 100): (2.0, 4.0), (1.0, 1): (4.0, 5.0), (1.0, 100): (3.0, 4.0)}
    errors = pd.DataFrame(
        [
            {"text": "held out", "damp": damp, "tokens_per_input": tokens, "solver": solver, "error_percent": error}
            for (damp, tokens), pair in held.items()
            for solver, error in zip(("sobs", "wanda"), pair, strict=True)
        ]
    )
    shift = pd.DataFrame({"panel": ["prose", "prose"], "calibrated_on": ["prose", "code"], "perplexity": [50.0, 60.0]})
    return {"errors": errors, "shift": shift}


def at(solver: str, damp: float, tokens: int, value: float) -> Callable[[Names], None]:
    def change(names: Names) -> None:
        table = names["errors"]
        place = (table["solver"] == solver) & (table["damp"] == damp) & (table["tokens_per_input"] == tokens)
        table.loc[place, "error_percent"] = value

    return change


def solvers_timed() -> Names:
    told = {"sparsegpt": 20.0, "sobs": 15.0, "admm": 14.0, "admm thorough": 13.0}
    rows = [{"pattern": p, "method": m, "error": e} for p in ("2:4", "8:16") for m, e in told.items()]
    return {"table": pd.DataFrame(rows)}


class Explorer:
    """As much of the pattern explorer as the check asks: a text that is read at once, or told to be wrong."""

    def __init__(self, caret: str = "^", draws: bool = True, writes: str = "3:4@1x2") -> None:
        self.grid, self.message = SimpleNamespace(svg="first"), SimpleNamespace(value="")
        self.spec, self.keep = Box(lambda text: self.read(text, caret, draws)), Box(lambda _: self.slide(writes))

    def read(self, text: str, caret: str, draws: bool) -> None:
        wrong = text.endswith("@")
        self.message.value = caret if wrong else ""
        self.grid.svg = text if draws and not wrong else self.grid.svg

    def slide(self, text: str) -> None:
        self.spec.value = text


class Box:
    """A value that tells when it is set."""

    def __init__(self, told: Callable[[Any], None]) -> None:
        self.__dict__.update(told=told, value=None)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value
        self.told(value)


def exploring(**options: Any) -> Names:
    table = pd.DataFrame({"index_bits": [0.75, 0.375]})
    found = {"spec": "2:4", "shape": [8, 16], "seed": 0, "table": table}
    return found | {"explore_patterns": lambda *given, **also: Explorer(**options)}


def stub(**options: Any) -> Callable[[Names], None]:
    return lambda names: names.update(exploring(**options))


def pruning(status: str = "stopped", message: str = "leaves a remainder") -> Names:
    solvers = ["wanda", "sparsegpt", "admm"]
    mask = s3.parse("2:4").bind((8, 16)).project(torch.rand(8, 16))
    table = pd.DataFrame({"solver": solvers, "error_percent": [30.0, 20.0, 15.0]})
    tried = SimpleNamespace(start=str, stop=str, wait=str, status=SimpleNamespace(value=status), table=[])
    tried.start, tried.stop, tried.wait = (lambda *given: None,) * 3
    tried.spec, tried.message = SimpleNamespace(value=""), SimpleNamespace(value=message)
    names = {"s3": s3, "checks": checks, "spec": "2:4", "last": {"mask": mask}, "solvers": solvers, "layer": "up"}
    explorer = SimpleNamespace(table=table)
    return names | {"explorer": explorer, "found": None, "explore_pruning": lambda *given, **also: tried}


def explored(**options: Any) -> Callable[[Names], None]:
    return lambda names: names.update(explore_pruning=pruning(**options)["explore_pruning"])


def corrected() -> Names:
    patterns, solvers = ["2:4", "8:16"], ["ria", "admm"]
    corrections = {"none": 0.0, "salient": -2.0, "finetune": -4.0}
    rows = [
        {"pattern": p, "solver": s, "correction": c, "perplexity": 60.0 - 3 * i + change}
        for i, p in enumerate(patterns)
        for s in solvers
        for c, change in corrections.items()
    ]
    table = pd.DataFrame(rows)
    return {"pruned": table, "patterns": patterns, "solvers": solvers, "corrections": list(corrections)}


def crossed() -> Names:
    texts, patterns, solvers = {"own": [], "other": []}, ["2:4", "8:16"], ["sparsegpt", "admm"]
    rises = {"magnitude": 90.0, "wanda": 50.0, "sparsegpt": 20.0, "admm": 10.0}
    pairs = [("2:4", method) for method in rises] + [("8:16", method) for method in solvers]
    rows: list[dict[str, Any]] = [{"pattern": "dense", "method": "dense", "calibrated_on": ""}]
    for pattern, method in pairs:
        for text in texts if pattern == "2:4" else ["own"]:
            far = {name: rises[method] + 5 * (name != text) for name in texts}
            row = {"pattern": pattern, "method": method, "calibrated_on": text}
            row |= {f"{name}_rise_percent": value for name, value in far.items()}
            rows.append(row | {f"{name}_perplexity": 20 + value for name, value in far.items()})
    given = {"table": pd.DataFrame(rows), "rows": rows, "texts": texts, "first": "own", "crossed": ["2:4"]}
    return given | {"pairs": pairs, "patterns": patterns}


def surrounded() -> Names:
    found = {
        "plain": (8.75, 10.0),
        "permute": (8.75, 9.5),
        "budget": (8.76, 9.0),
        "wrap": (9.1, 7.0),
        "all": (9.1, 6.0),
    }
    rows = [
        {"pattern": "2:4", "seed": 0, "stack": stack, "bits": bits, "error_test_percent": error}
        for stack, (bits, error) in found.items()
    ]
    return {
        "rows": pd.DataFrame(rows).assign(documentation_perplexity=55.0),
        "rivals": pd.DataFrame({"stack": ["dense", "int8"], "documentation_perplexity": [50.0, 50.1]}),
        "stacks": {"plain": (), "permute": ("permute",), "budget": ("budget",), "wrap": ("wrap",)}
        | {"all": ("permute", "budget", "wrap")},
        "ingredients": ["permute", "budget", "wrap"],
        "families": {"2:4": "{n}:4"},
        "measured": ["documentation_perplexity"],
        "seeds": [0],
    }


def weighed() -> Names:
    kinds = {"dense": ["same", "int8"], "2:4": ["same", "int4"]}
    rows = [
        {"model": "dense", "values": "same", "file_bytes": 22, "memory_bytes": 21, "perplexity": 50.0},
        {"model": "dense int8", "values": "int8", "file_bytes": 12, "memory_bytes": 13, "perplexity": 50.1},
        {"model": "2:4", "values": "same", "file_bytes": 13, "memory_bytes": 14, "perplexity": 52.0},
        {"model": "2:4 int4", "values": "int4", "file_bytes": 6, "memory_bytes": 7, "perplexity": 52.3},
    ]
    sizes = [{"matrix_bytes": 20, "counted_bytes": 20.0, "unpacked_perplexity": row["perplexity"]} for row in rows]
    table = pd.DataFrame([row | size for row, size in zip(rows, sizes, strict=True)])
    by_bytes = table[["model"]].assign(frontier=[True, True, False, True])
    return {"table": table, "models": kinds, "by_bytes": by_bytes, "layers": pd.DataFrame({"error": [0.001, 0.002]})}


def fewer(names: Names) -> None:
    names["rows"] = names["rows"][1:]


RIGHT: dict[str, Callable[[], Names]] = {
    "00": training,
    "01": patterns,
    "02": one_layer,
    "03": layer_by_layer,
    "05": calibration,
    "06": tour,
    "07": solvers_timed,
    "08": exploring,
    "09": pruning,
    "10": corrected,
    "11": inputs,
    "12": weighed,
    "13": from_nothing,
    "14": recovery,
    "15": surrounded,
    "16": crossed,
}
WRONG = [
    ("00", "toy model learns", put("table", (1, "perplexity"), 600.0)),
    ("00", "shipped: test perplexity below a tenth of unigram", put("perplexity", (), 100.0)),
    ("00", "no paragraph in two splits", repeated),
    ("02", "S-OBS at least 8 % below SparseGPT", put("table", (3, "error_percent"), 19.0)),
    ("02", "ADMM below S-OBS", put("table", (9, "error_test_percent"), 17.0)),
    ("02", "OBD below magnitude", put("table", (1, "error_percent"), 41.0)),
    ("02", "one damping for all", put("table", (0, "damp"), 0.1)),
    ("05", "few tokens, little damping: S-OBS worse than Wanda on held-out text", at("sobs", 0.001, 1, 4.0)),
    ("05", "few tokens, damping 1: no worse", at("sobs", 1.0, 1, 6.0)),
    ("05", "plenty of tokens: better at any damping", at("sobs", 1.0, 100, 5.0)),
    ("05", "each text is best served by itself", put("shift", (1, "perplexity"), 40.0)),
    ("07", "ADMM at most 0.85 of SparseGPT's error", put("table", (0, "error"), 16.0)),
    ("07", "ADMM below S-OBS on every pattern", put("table", (5, "error"), 13.9)),
    ("07", "more effort, less error on average", put("table", (3, "error"), 15.5)),
    ("08", "a wrong text is answered with a caret", stub(caret="")),
    ("08", "a right one is drawn at once", stub(draws=False)),
    ("08", "the slider writes the text", stub(writes="2:4@1x2")),
    ("08", "a coarser block needs a smaller index", put("table", (1, "index_bits"), 0.75)),
    ("09", "the last mask satisfies its spec", put("last", (), {"mask": torch.ones(8, 16).bool()})),
    ("09", "all were pruned", put("solvers", (), ["wanda", "admm"])),
    (
        "09",
        "from scores alone to exact weights the error falls",
        lambda n: put("t", (2, "error_percent"), 25.0)({"t": n["explorer"].table}),
    ),
    ("09", "stop stops", explored(status="done")),
    ("09", "a spec that does not fit is told", explored(message="")),
    ("10", "every combination is there", put("corrections", (), ["none"])),
    ("10", "more freedom, lower perplexity of scores", put("pruned", (6, "perplexity"), 61.0)),
    ("10", "salient weights lower it", put("pruned", (4, "perplexity"), 61.0)),
    ("10", "fine-tuning lowers that of scores", put("pruned", (2, "perplexity"), 61.0)),
    ("12", "every model is there", put("models", (), {"dense": ["same"]})),
    (
        "12",
        "packed and loaded again, perplexity is the same to the last digit",
        put("table", (2, "perplexity"), 52.000000001),
    ),
    ("12", "a packed matrix takes what the algebra counts, to 1 %", put("table", (2, "matrix_bytes"), 21)),
    ("12", "packed models are smaller on disk", put("table", (2, "file_bytes"), 22)),
    ("12", "2:4 is smaller in memory", put("table", (2, "memory_bytes"), 21)),
    (
        "12",
        "rounded to int8, the dense model is better than 2:4 in fewer bytes",
        put("table", (1, "perplexity"), 52.5),
    ),
    ("12", "no model drawn beats 2:4 in int4 in both bytes and perplexity", put("by_bytes", (3, "frontier"), False)),
    ("12", "a packed layer's product is that of its weight", put("layers", (1, "error"), 0.02)),
    ("15", "every stack is there", put("seeds", (), [0, 1])),
    ("15", "an order, a rotation and the loss cost no bits", put("rows", (1, "bits"), 8.9)),
    ("15", "budgets meet the pattern's bits, to 0.5 %", put("rows", (2, "bits"), 8.9)),
    ("15", "a wrapped core leaves less error", put("rows", (3, "error_test_percent"), 12.0)),
    (
        "15",
        "rounded to int8, the dense model is better than any that nothing surrounds",
        put("rivals", (1, "documentation_perplexity"), 60.0),
    ),
    ("16", "every row is there", fewer),
    ("16", "ADMM < SparseGPT < Wanda < magnitude", put("table", (3, "own_rise_percent"), 95.0)),
    ("16", "ADMM below SparseGPT on every pattern", put("table", (10, "own_rise_percent"), 21.0)),
    ("16", "each text is best served by itself", put("table", (8, "own_perplexity"), 29.0)),
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
    assert told == stored(name)
    assert told.keys() == {label for notebook, label, _ in WRONG if notebook == name}


@pytest.mark.parametrize(("name", "label", "change"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_result_is_told(name, label, change):
    names = RIGHT[name]()
    change(names)
    assert run_check(name, names)[label] != stored(name)[label]


@pytest.mark.parametrize("name", [path.name[:2] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))])
def test_nothing_is_claimed_by_an_error_alone(name):
    """A check that raises says nothing of the others, and one that only prints can't be False."""
    check = find_check(name)
    assert ".check(" not in check.source
    for line in check.source.splitlines():
        assert not line.startswith("print(") or not line.rstrip().endswith('")'), line


def compare_models(folder: Path) -> tuple[dict[str, str], str]:
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
    assert right == stored("04")
    assert told.startswith("stored, made at another commit: prune_magnitude_layers.csv prune_wanda_layers.csv")
    path = tables / "prune_sobs_layers.csv"
    worse = pd.read_csv(path)
    worse["perplexity"] *= 1.1
    worse.to_csv(path, index=False)
    assert set(compare_models(tables)[0].values()) == {"False"}


def test_tables_that_were_run_are_told_from_stored_ones(tables):
    made = tables / "prune_sobs_layers.json"
    for told, fresh in (({"commit": "0" * 40}, False), (record.commit(), True)):
        made.write_text(json.dumps(told))
        assert record.is_fresh(made.with_suffix(".csv")) is fresh
        assert ("sobs" not in compare_models(tables)[1]) is fresh
