"""What pages take from the package: ``{{ patterns }}`` is the table of named ones, ``{{ grammar }}`` the rules."""

from textwrap import dedent

from s3lab.algebra import text as language
from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import PATTERNS, parse
from s3lab.lab.gallery import GALLERY

SHAPE = 256, 512  # that every named pattern divides


def write_table() -> str:
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


def on_page_markdown(markdown: str, **_: object) -> str:
    for mark, write in {"{{ patterns }}": write_table, "{{ grammar }}": write_rules}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    return markdown
