"""What pages take from the package and its measurements: ``{{ patterns }}``, ``{{ grammar }}`` and ``{{ speed }}``."""

import csv
from pathlib import Path
from textwrap import dedent

from s3lab.algebra import text as language
from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import PATTERNS, parse
from s3lab.lab.gallery import GALLERY

ROOT = Path(__file__).parents[2]
METHODS = "sparsegpt", "sparsegpt + refit", "sobs", "admm quick", "admm"
SHAPE = 256, 512  # that every named pattern divides


def write_patterns() -> str:
    lines = [
        "| name | text | S × B × E | density | storage, bits per weight | proposed by |",
        "|---|---|---|---:|---:|---|",
    ]
    for name, text in PATTERNS.items():
        pattern = parse(name)
        if isinstance(pattern, Coupled):
            raise TypeError(f"{name} couples tensors and has no shape of one weight: give it a table of its own")
        bound = pattern.bind(SHAPE)
        part = bound.first_part
        source = GALLERY[name].source if name in GALLERY else ""
        cut = f"{part.S} × {part.B} × {part.E}"
        text = text.replace("|", "\\|")
        lines.append(f"| `{name}` | `{text}` | {cut} | {bound.density:.4g} | {bound.storage_bits:.3f} | {source} |")
    return "\n".join(lines)


def write_rules() -> str:
    """Return the rules of the grammar from the docstring of the module that reads it."""
    return dedent((language.__doc__ or "").split("\n\n")[1])


def write_speed() -> str:
    """Return the solvers of this package in the committed measurement of their speed."""
    with (ROOT / "benchmarks" / "results" / "compare_solvers_speed.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["method"] in METHODS]
    head = ["| method | error | held-out error | time, s | memory above the start, MiB |", "|---|---:|---:|---:|---:|"]
    return "\n".join(
        [
            *head,
            *(
                f"| `{row['method']}` | {float(row['error']):.1%} | {float(row['error_test']):.1%} "
                f"| {float(row['time_s']):.2f} | {float(row['mem_mib'] or 0):.0f} |"
                for row in rows
            ),
        ]
    )


def on_page_markdown(markdown: str, **_: object) -> str:
    for mark, write in {"{{ patterns }}": write_patterns, "{{ grammar }}": write_rules, "{{ speed }}": write_speed}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    return markdown
