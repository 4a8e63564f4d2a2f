"""Docstrings as Markdown: examples fenced, tables and lists of options in its own signs, names that are links."""

import re
from typing import Any

from griffe import Extension, Object

import s3lab

PLACES = {
    name: f"{thing.__module__}.{thing.__qualname__}"
    for name in s3lab.__all__
    if hasattr(thing := getattr(s3lab, name), "__qualname__")
}
OPTION = re.compile(r"^(?P<names>[a-z_]+(?:, [a-z_]+)*)$")


class Markdown(Extension):
    """Rewrites each docstring as it is found; the source keeps the form that reads well in a terminal."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = translate(obj.docstring.value)


def translate(text: str) -> str:
    """Return a docstring as Markdown, paragraph by paragraph.

    >>> translate("One.\\n\\n>>> 1 + 1\\n2")
    'One.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    return "\n\n".join(translate_paragraph(p) for p in re.split(r"\n[ \t]*\n", text.strip("\n")))


def translate_paragraph(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if lines[0].startswith(">>>"):
        return "```pycon\n" + paragraph + "\n```"
    if re.fullmatch(r"=+( +=+)+", lines[0]):
        return write_table(lines)
    if len(lines) > 1 and OPTION.match(lines[0]) and all(OPTION.match(line) or line[:4] == "    " for line in lines):
        return write_options(paragraph)
    return paragraph if lines[0].startswith("    ") else link_names(paragraph)


def link_names(paragraph: str) -> str:
    """Turn the public names between single backticks into links to their places."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        return f"[`{name}`][{PLACES[name]}]" if name in PLACES else found[0]

    return re.sub(r"(?<!`)`(\w+)`(?!`)", link, paragraph)


def write_table(lines: list[str]) -> str:
    """Turn a table ruled with ``=``, which has no head, into one with bars."""
    starts = [found.start() for found in re.finditer(r"=+", lines[0])]
    rows = [
        [cell.strip().replace("``", "`") for cell in cut(line, starts)] for line in lines if not line.startswith("==")
    ]
    head = "| " + " | ".join("" for _ in starts) + " |"
    return "\n".join([head, "|" + "---|" * len(starts), *("| " + " | ".join(row) + " |" for row in rows)])


def cut(line: str, starts: list[int]) -> list[str]:
    return [line[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def write_options(paragraph: str) -> str:
    """Turn options, each with its text indented below, into a list of definitions.

    >>> write_options("rows\\n    at a time,\\n    or None")
    '`rows`\\n:   at a time,\\n    or None'
    """
    entries = re.split(r"\n(?! )", paragraph)
    return "\n\n".join(write_option(*entry.split("\n", 1)) for entry in entries)


def write_option(names: str, told: str = "") -> str:
    terms = ", ".join(f"`{name}`" for name in names.split(", "))
    return f"{terms}\n:   {told.strip()}"
