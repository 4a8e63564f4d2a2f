"""The few pieces of HTML that results show themselves with in a notebook: a captioned drawing, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def caption(drawing: str, text: str) -> str:
    """Return a drawing, itself markup, with a text of one or more lines under it.

    >>> caption("<svg></svg>", "2 < 4")
    '<figure style="margin:0"><svg></svg><figcaption style="white-space:pre-line">2 &lt; 4</figcaption></figure>'
    """
    told = f'<figcaption style="white-space:pre-line">{escape(text)}</figcaption>'
    return f'<figure style="margin:0">{drawing}{told}</figure>'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a column for each key of the first row; floats to four digits, None left blank.

    >>> table([{"solver": "sobs", "error": 0.0781}])
    '<table><tr><th>solver</th><th>error</th></tr><tr><td>sobs</td><td>0.0781</td></tr></table>'
    """
    keys = list(rows[0]) if rows else []
    lines = ["".join(f"<th>{escape(key)}</th>" for key in keys)]
    lines += ["".join(f"<td>{escape(_write(row.get(key)))}</td>" for key in keys) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _write(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
