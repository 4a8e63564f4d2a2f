"""Every figure in a table of the README and the documentation is that of its CSV, cell by cell."""

import csv
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIGURE = re.compile(r"[+-]?\d+\.\d+")


@dataclass(frozen=True)
class Source:
    """Where the cells of a table come from: the first cells of a row, and the head of a column, pick a row and a value.

    ``rows`` are the columns of the CSV that the first cells name.  The head of each other column names a value of the
    CSV's ``column``, of which ``value`` is shown, or, where there is no ``column``, a column of its own.  ``where``
    holds of all rows.  Names are those of the CSV but for `NAMES`.
    """

    file: str
    rows: tuple[str, ...]
    column: str = ""
    value: str = ""
    where: tuple[tuple[str, str], ...] = ()

    def look_up(self, keys: list[str], head: str) -> float:
        wanted = (
            dict(self.where) | dict(zip(self.rows, keys, strict=True)) | ({self.column: head} if self.column else {})
        )
        found = [row for row in read(self.file) if all(row[key] == value for key, value in wanted.items())]
        assert len(found) == 1, f"{len(found)} rows of {self.file} have {wanted}"
        return float(found[0][self.value or head])


NAMES = {
    "`up_proj`": "model.layers.15.mlp.up_proj",
    "`down_proj`": "model.layers.15.mlp.down_proj",
    "S-OBS": "sobs",
    "50 % a row": "50%/row",
    "rise": "rise_percent",
    "mean error of a matrix": "error_percent",
    "mean error": "error_percent",
    "built-in text": "documentation_perplexity",
    "rise here": "documentation_rise_percent",
    "WikiText-2": "wikitext_perplexity",
    "rise there": "wikitext_rise_percent",
    "bytes per weight": "bytes_per_weight",
    "change": "change_percent",
    "least": "least_percent",
    "most": "most_percent",
    "2560 × 9728": "2560",
    "9728 × 2560": "9728",
    "inputs' error": "error_inputs_change_percent",
    "loss's error": "error_loss_change_percent",
}
PLAIN = (("correction", "none"), ("seed", "0"))
PATTERNS = "benchmarks/results/compare_nm_patterns.csv"
LOSS = "benchmarks/results/loss_hessian"
REAL = "figures/smollm2/texts_smollm2.csv"
# by the page and the heading that the table is under
TABLES = {
    ("README.md", "What it makes: Table 1"): Source(
        "figures/smollm2/compare_single_layer.csv", ("layer", "pattern"), "solver", "error_percent"
    ),
    ("README.md", "A language model, end to end"): Source("figures/table_2.csv", ("run",)),
    ("README.md", "What it does to a real language model"): Source(
        REAL, ("method",), where=(("pattern", "2:4"), ("calibrated_on", "documentation"))
    ),
    ("README.md", "Calibrated on the other text"): Source(
        REAL, ("method",), where=(("pattern", "2:4"), ("calibrated_on", "wikitext"))
    ),
    ("README.md", "Other patterns"): Source(
        REAL, ("pattern",), "method", "documentation_perplexity", (("calibrated_on", "documentation"),)
    ),
    ("README.md", "Salient weights"): Source(
        "benchmarks/results/salient_model.csv", ("pattern",), "method", "documentation_perplexity"
    ),
    ("README.md", "Around the mask"): Source(
        "benchmarks/results/stack.csv", ("pattern", "stack", "budgets"), "solver", "documentation_perplexity"
    ),
    ("README.md", "Beyond 2:4: weights, inputs, corrections"): Source(
        PATTERNS, ("solver",), "pattern", "perplexity", PLAIN
    ),
    ("docs/training.md", "From nothing"): Source(
        "figures/training/scratch_small_changes.csv", ("pattern", "method"), "against", "change_percent"
    ),
    ("docs/training.md", "What a step takes"): Source("benchmarks/results/time_training_step.csv", ("method",)),
    ("docs/packing.md", "Layers that run packed"): Source(
        "benchmarks/results/time_packed.csv", ("pattern", "dtype"), "M", "faster", (("method", "s3lab"),)
    ),
    ("docs/packing.md", "A whole model, against rounding"): Source("figures/smollm2/weigh_smollm2.csv", ("model",)),
    ("docs/packing.md", "The reference model"): Source("figures/weigh_reference.csv", ("model",)),
    ("docs/solvers.md", "Salient weights"): Source(
        "benchmarks/results/salient_gain.csv", ("pattern",), "solver", "gain_error_mean"
    ),
    ("docs/how-to/prune-my-model.md", "Weighted by the loss"): Source(
        f"{LOSS}_gain.csv", ("pattern", "solver"), where=(("model", "reference"),)
    ),
}


def read(file: str) -> list[dict[str, str]]:
    with (ROOT / file).open() as lines:
        return list(csv.DictReader(lines))


def find_tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """The tables of a page that hold figures, each with the heading above it and its cells, the head first."""
    found, heading, lines = [], "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            lines.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif lines:
            if any(read_figure(cell) is not None for row in lines[2:] for cell in row[1:]):
                found.append((heading, [lines[0], *lines[2:]]))
            lines = []
    return found


def read_figure(cell: str) -> str | None:
    """The figure in a cell, if it holds nothing else but emphasis and a sign of per cent."""
    bare = cell.replace("*", "").replace("%", "").replace("−", "-").strip()
    return bare if FIGURE.fullmatch(bare) else None


def name(cell: str) -> str:
    return NAMES.get(cell, cell.lower().strip("`"))


def compare(rows: list[list[str]], source: Source) -> int:
    """Compare the cells of a table with its source, and return how many; AssertionError at the first that differs."""
    depth, compared = len(source.rows), 0
    for row in rows[1:]:
        for head, cell in zip(rows[0][depth:], row[depth:], strict=True):
            if (told := read_figure(cell)) is not None:
                value = source.look_up([name(key) for key in row[:depth]], name(head))
                digits = len(told.partition(".")[2])
                assert f"{value:.{digits}f}" == told, f"{row[:depth]}, {head}: {told} is told, {value} in {source.file}"
                compared += 1
    return compared


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_figure_of_a_table_is_that_of_its_csv(page):
    for heading, rows in find_tables(page.read_text()):
        key = str(page.relative_to(ROOT)), heading
        assert key in TABLES, f"a table under {heading!r} of {key[0]}: say in TABLES which CSV it is of"
        assert compare(rows, TABLES[key]) > 0


def test_every_source_is_of_a_table_that_is_there():
    there = {(str(page.relative_to(ROOT)), heading) for page in PAGES for heading, _ in find_tables(page.read_text())}
    assert there == TABLES.keys()


def test_a_figure_that_is_not_that_of_its_csv_is_noticed():
    (key, source), *_ = TABLES.items()
    rows = next(rows for heading, rows in find_tables((ROOT / key[0]).read_text()) if heading == key[1])
    assert compare(rows, source) > 40
    rows[3][4] = "99.9"
    with pytest.raises(AssertionError, match=r"99\.9 is told"):
        compare(rows, source)


def plain(**wanted: str) -> list[float]:
    rows = [row for row in read(PATTERNS) if all(row[key] == value for key, value in wanted.items())]
    return sorted(float(row["perplexity"]) for row in rows)


def test_the_readme_says_what_a_smaller_dense_model_does():
    text = " ".join((ROOT / "README.md").read_text().split())
    small = next(row for row in read(PATTERNS) if row["solver"] == "small")
    pruned = min((row for row in read(PATTERNS) if row["pattern"] != "dense"), key=lambda row: float(row["perplexity"]))
    assert float(small["perplexity"]) < float(pruned["perplexity"])
    for row in (small, pruned):
        assert f"{float(row['perplexity']):.2f}" in text and f"{float(row['bits']):.2f} bits" in text
    wider = next(
        float(row["bits"]) for row in read(PATTERNS) if row["pattern"] == "8:16" and row["correction"] == "none"
    )
    assert f"{wider / float(small['bits']) - 1:.1%}".replace("%", " % more bits") in text


@pytest.mark.parametrize("solver", ["admm", "sparsegpt"])
def test_the_readme_says_how_far_seeds_are_apart(solver):
    text = " ".join((ROOT / "README.md").read_text().split())
    seeds = plain(pattern="8:16", solver=solver, correction="none")
    assert len(seeds) == 5 and f"{seeds[0]:.2f} to {seeds[-1]:.2f}" in text
    assert f"{seeds[-1] - seeds[0]:.2f} with" in text


def test_the_page_on_the_losss_hessian_says_what_its_study_found():
    text = " ".join((ROOT / "docs" / "how-to" / "prune-my-model.md").read_text().split())
    rows = [row for row in read(f"{LOSS}.csv") if row["model"] == "reference" and row["pattern"] != "dense"]
    pairs: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        pairs.setdefault((row["seed"], row["pattern"], row["solver"]), {})[row["hessian"]] = float(row["perplexity"])
    lower = sum(pair["loss"] < pair["inputs"] for pair in pairs.values())
    assert f"it is lower in {lower} of the {len(pairs)} pairs" in text
    gains = [row for row in read(f"{LOSS}_gain.csv") if row["model"] == "reference"]
    assert all(float(row["change_percent"]) > 0 > float(row["error_loss_change_percent"]) for row in gains)
    for row in gains:
        own = [p for key, p in pairs.items() if key[1:] == (row["pattern"], row["solver"])]
        assert len(own) == int(row["seeds"])
        for hessian in ("inputs", "loss"):
            assert float(row[hessian]) == pytest.approx(sum(p[hessian] for p in own) / len(own), rel=1e-5)


def test_the_solver_card_of_admm_says_what_its_studies_found():
    text = " ".join((ROOT / "docs" / "solvers.md").read_text().split())
    dual = read("benchmarks/results/admm_dual.csv")
    told = {"balanced": "in 56 of 60", "quick": "in 57 at quick", "thorough": "in 44 at thorough"}
    unseen = []
    for effort in ("balanced", "quick", "thorough"):
        rows = [row for row in dual if row["effort"] == effort]
        ratios = [float(row["unscaled"]) / float(row["rescaled"]) for row in rows]
        unseen.append(sum(float(row["unscaled_test"]) < float(row["rescaled_test"]) for row in rows))
        lower, mean = sum(ratio < 1 for ratio in ratios), prod(ratios) ** (1 / len(ratios))
        assert len(rows) == 60 and f"in {lower} " in told[effort] and told[effort] in text
        assert f"by {100 * (1 - mean):.2f} %" in text
    assert f"lower in {unseen[0]}, {unseen[1]} and {unseen[2]} of 60" in text
    runs = [row for row in read("benchmarks/results/admm_variants.csv") if row["variant"] == "admm"]
    steps = [int(row["steps"]) for row in runs]
    assert f"; {min(steps)} to {max(steps)} and {-(-min(steps) // 3)} to {-(-max(steps) // 3)} with" in text
    assert f"in the {len(runs)} runs" in text

    steepest = [row for row in read("benchmarks/results/admm_rho.csv") if row["decay"] == "1.5"]
    for width, error in (("8", "4.9 %"), ("16", "5.3 %")):
        above = []
        for seed in "0123":
            own = {
                row["factor"]: float(row["error"]) for row in steepest if (row["width"], row["seed"]) == (width, seed)
            }
            above.append(100 * (own["1"] / min(own.values()) - 1))
        assert f"{sum(above) / 4:.1f} %" == error and error in text


def test_the_readme_says_of_the_real_model_what_its_table_says():
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = {(row["calibrated_on"], row["method"]): row for row in read(REAL) if row["pattern"] in ("dense", "2:4")}

    def rise(method: str) -> float:
        return float(rows["documentation", method]["documentation_rise_percent"])

    for method in ("admm", "sobs"):
        assert f"{100 * (1 - rise(method) / rise('sparsegpt')):.0f} %" in text
    for on in ("documentation", "wikitext"):
        dense, best = (float(row[f"{on}_perplexity"]) for row in (rows["", "dense"], rows["documentation", "admm"]))
        assert f"it has {dense:.2f}" in text or f"dense model has {dense:.2f}" in text
        assert f"{best / dense:.1f} times" in text
        order = [float(rows[on, method][f"{on}_perplexity"]) for method in ("admm", "sobs", "sparsegpt", "wanda")]
        assert order == sorted(order)
        assert float(rows[on, "admm"][f"{on}_perplexity"]) == min(
            float(rows[other, "admm"][f"{on}_perplexity"]) for other in ("documentation", "wikitext")
        )
