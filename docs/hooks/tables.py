"""What pages take from the package and its measurements, by marks such as ``{{ patterns }}``: see `WRITERS`."""

import csv
import re
from math import exp, fsum, log
from pathlib import Path
from statistics import median
from textwrap import dedent

import torch

from s3lab.algebra import text as language
from s3lab.algebra.patterns import PATTERNS, parse
from s3lab.lab.draw.gallery import GALLERY
from s3lab.packing.codec import pack

ROOT = Path(__file__).parents[2]
METHODS = "sparsegpt", "sparsegpt + refit", "sobs", "admm quick", "admm"
SHAPE = 256, 512  # that every named pattern divides


def write_patterns() -> str:
    """Return a row for each named pattern, counted on a weight of `SHAPE`."""
    lines = [
        "| name | text | S × B × E | density | storage, bits per weight | proposed by |",
        "|---|---|---|---:|---:|---|",
    ]
    for name, text in PATTERNS.items():
        bound = parse(name).bind(SHAPE)
        part = bound.first_part
        source = GALLERY[name].source if name in GALLERY else ""
        counts = f"{part.S} × {part.B} × {part.E}"
        lines.append(f"| `{name}` | `{text}` | {counts} | {bound.density:.4g} | {bound.storage_bits:.3f} | {source} |")
    return "\n".join(lines)


def write_rules() -> str:
    """Return the rules of the grammar from the docstring of the module that reads it."""
    return dedent((language.__doc__ or "").split("\n\n")[1])


def write_speed() -> str:
    """Return the solvers of this package in the committed measurement of their speed."""
    rows = [row for row in read_results("compare_solvers_speed") if row["method"] in METHODS]
    lines = ["| method | M × K | error | held-out error | time, s |", "|---|---|---:|---:|---:|"]
    for row in rows:
        error, unseen, time_s = (float(row[key]) for key in ("error", "error_test", "time_s"))
        lines.append(f"| `{row['method']}` | {row['M']} × {row['K']} | {error:.1%} | {unseen:.1%} | {time_s:.2f} |")
    return "\n".join(lines)


def write_variants() -> str:
    """Return other ways to go about ADMM, their errors as multiples of its: geometric mean and largest, by layers."""
    rows = read_results("admm_variants")
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row["layer"], row["seed"], row["pattern"]), {})[row["variant"]] = float(row["error"])
    lines = ["| | ordinary layers | largest | odd layers | largest |", "|---|---:|---:|---:|---:|"]
    for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"] != "admm"):
        cells: list[float] = []
        for ordinary in (True, False):
            own = [errors for case, errors in cases.items() if case[0].startswith("decay") is ordinary]
            ratios = [errors[variant] / errors["admm"] for errors in own]
            cells += [exp(fsum(map(log, ratios)) / len(ratios)), max(ratios)]
        lines.append(f"| {variant} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def write_corrections() -> str:
    """Return what each correction changes, with its confidence interval, a column for each solver."""
    rows = read_results("compare_nm_patterns_gain")
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = ["| correction | " + " | ".join(solvers) + " |", "|---|" + "---:|" * len(solvers)]
    for correction in dict.fromkeys(row["correction"] for row in rows):
        found = {row["solver"]: row for row in rows if row["correction"] == correction}
        cells = (f"{float(found[s]['change_percent']):+.2f} ± {float(found[s]['half_width']):.2f}" for s in solvers)
        lines.append(f"| {correction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_costs() -> str:
    """Return where the time of a pruning went, medians over the repeats, in shares of the two passes that it needs."""
    rows = read_results("time_pruning")
    parts = {
        "passes made": "passes_made_s",
        "second moments": "moments_s",
        "solver": "solve_s",
        "writing": "write_s",
        "in all": "total_s",
    }
    lines = ["| dtype | solver | " + " | ".join(parts) + " |", "|---|---|" + "---:|" * len(parts)]
    for dtype, solver in dict.fromkeys((row["dtype"], row["solver"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["solver"]) == (dtype, solver)]
        cells = (median(float(row[part]) / float(row["two_passes_s"]) for row in own) for part in parts.values())
        lines.append(f"| {dtype} | `{solver}` | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def write_packing() -> str:
    """Return a row for each named pattern, and for N:M, packed on a random weight of `SHAPE`."""
    lines = [
        "| pattern | kept | index, bits per weight | as counted | all, bits per weight |",
        "|---|---:|---:|---:|---:|",
    ]
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ["2:4", "4:8", "8:16", "16:32", "25%", "50%/row", *PATTERNS]:
        bound = parse(name).bind(SHAPE)
        packed = pack(W.where(bound.project(W.float().abs()), 0), name)
        kept, index = packed.values[""].count / packed.weights, 8 * len(packed.index) / packed.weights
        told = f"{index:.4f} | {bound.storage_bits:.4f} | {packed.bits_per_weight:.4f}"
        lines.append(f"| `{name}` | {kept:.4f} | {told} |")
    return "\n".join(lines)


def read_results(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open() as lines:
        return list(csv.DictReader(lines))


WRITERS = {
    "patterns": write_patterns,
    "grammar": write_rules,
    "speed": write_speed,
    "variants": write_variants,
    "corrections": write_corrections,
    "costs": write_costs,
    "packing": write_packing,
}


def on_page_markdown(markdown: str, **_: object) -> str:
    # a bar in code within a table: GitHub wants it escaped, and shows it bare; here it is bare
    markdown = re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), markdown)
    for name, write in WRITERS.items():
        if (mark := "{{ " + name + " }}") in markdown:
            markdown = markdown.replace(mark, write())
    return markdown
