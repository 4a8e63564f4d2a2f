"""Text to calibrate and to measure on: what every Python installation carries, a local file, or the hub's.

The built-in text is the language reference of ``pydoc`` and the docstrings of the standard library, read from
source.  A document belongs to one split by a hash of its name, the same on every machine and in every Python;
the hub's data sets come with splits of their own.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s3lab.errors import DataError
from s3lab.files import find_cache, write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A document whose hash, taken as a number from 0 to 1, lies below the first of these belongs to its split.
SPLITS = {"test": 0.08, "calibration": 0.20, "train": 1.0}
# The data sets of the Hugging Face hub: repository, configuration, column of text, and the split to measure on.
HUB = {
    "c4": ("allenai/c4", "en", "text", "validation"),
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "page", "test"),
    "wikitext-103": ("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", "page", "test"),
}
_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "turtledemo", "lib2to3", "pydoc_data", "site-packages", "dist-packages")
)


@dataclass(frozen=True, slots=True)
class Document:
    """A named piece of text, whole within one split."""

    name: str
    text: str

    @property
    def split(self) -> str:
        """The split this document belongs to, by the hash of its name alone.

        >>> Document("docstrings/json.decoder", "").split
        'calibration'
        """
        digest = hashlib.blake2b(self.name.encode(), digest_size=4).digest()
        point = int.from_bytes(digest) / 2**32
        return next(name for name, end in SPLITS.items() if point < end)


@cache
def documents() -> tuple[Document, ...]:
    """Return the built-in documents by name, no paragraph occurring twice among them all.

    A paragraph stays with the first document that holds it, whatever its line breaks; documents left without
    text are dropped.  The standard library is parsed, never imported, which takes a few seconds: what was read is kept
    in the cache folder, for this version of Python.

    >>> any(document.name == "topics/with" for document in documents())
    True
    """
    key = hashlib.sha256("\n".join((sys.version, ast.__file__, Path(__file__).read_text())).encode()).hexdigest()
    path = find_cache() / f"text-{key[:16]}.json"
    if (kept := _recall(path)) is None:
        kept = list(_read_library())
        with suppress(OSError):  # what cannot be kept is read again
            write(path, json.dumps({"sha256": _seal(kept), "documents": kept}).encode())
    return tuple(Document(name, text) for name, text in kept)


def paragraphs(text: str) -> list[str]:
    """Cut text at its blank lines, without control characters, tabs and trailing blanks.

    >>> paragraphs("One\\tline\\x07 \\nmore.\\n \\nAnother.")
    ['One     line\\nmore.', 'Another.']
    """
    clean = "".join(c for c in text.expandtabs() if c.isprintable() or c == "\n")
    lines = "\n".join(line.rstrip() for line in clean.split("\n"))
    return [part for part in re.split(r"\n{2,}", lines.strip("\n")) if part]


def read(split: str, source: str | Path = "stdlib", seed: int = 0) -> Iterator[str]:
    """Return the texts of a split's documents ("train", "calibration" or "test"), one after the other.

    ``source`` is "stdlib"; the path of a UTF-8 file, whose paragraphs are documents named by their words; or
    "c4", "wikitext" or "wikitext-103" of the Hugging Face hub, streamed in an order drawn with ``seed``: their
    training text is both "train" and "calibration".  A file or "stdlib" may be cut instead, as `cut_source` reads
    it: "FILE[:50%]" is the first half of its documents by length, "FILE[50%:]" the rest, each whole in any split.
    DataError if there is no such split, no such file, it is not UTF-8, or the hub cannot be reached.

    >>> sum(len(text.split()) for text in read("test")) > 20_000
    True
    """
    if split not in SPLITS:
        raise DataError(f"no split is called {split!r}: choose one of {', '.join(SPLITS)}")
    if source in HUB:
        return _stream(str(source), split, seed)
    path, part = cut_source(source)
    chosen = documents() if path == "stdlib" else _read_file(Path(path))
    if part is None:
        return (document.text for document in chosen if document.split == split)
    total = sum(len(document.text) for document in chosen)
    begins = accumulate((len(document.text) for document in chosen), initial=0)
    share = (100 * begin / total for begin in begins)
    return (document.text for document, at in zip(chosen, share, strict=False) if part[0] <= at < part[1])


def cut_source(source: str | Path) -> tuple[str, tuple[int, int] | None]:
    """Return the path of a source and the part of it that it asks for, in per cent; None where it asks for no part.

    >>> cut_source("text.txt[:50%]"), cut_source("text.txt[50%:]"), cut_source("text.txt")
    (('text.txt', (0, 50)), ('text.txt', (50, 100)), ('text.txt', None))
    """
    found = re.fullmatch(r"(.+)\[(?:([0-9]{1,3})%)?:(?:([0-9]{1,3})%)?\]", str(source))
    if found is None:
        return str(source), None
    return found[1], (int(found[2] or 0), int(found[3] or 100))


def text(split: str, source: str | Path = "stdlib") -> str:
    """Return the text of a split of "stdlib" or of a file, as `read` does, documents joined by blank lines.

    DataError as `read`, and for the hub's data sets, which have no whole.
    """
    if source in HUB:
        raise DataError(f"{source!r} is streamed, never read as a whole: ask for a number of windows or documents")
    return "\n\n".join(read(split, source))


def tokens(
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    length: int,
    count: int | None = None,
    seed: int = 0,
    source: str | Path = "stdlib",
) -> Tensor:
    """Return non-overlapping windows of a split's tokens, an int64 tensor (N, length).

    All windows in order when ``count`` is None, else ``count`` of them, drawn with ``seed``: from all the text,
    or, of the hub's, from as much as fills them.  A tail shorter than a window is left out.  DataError as `text`,
    and if there are too few.
    """

    def encode(words: str) -> list[int]:
        return tokenizer.encode(words, add_special_tokens=False, verbose=False)

    if source in HUB and count is not None:
        streamed = chain.from_iterable(encode(f"{words}\n\n") for words in read(split, source, seed))
        encoded = list(islice(streamed, count * length))
    else:
        encoded = encode(text(split, source))
    ids = torch.tensor(encoded, dtype=torch.int64)
    windows = ids[: len(ids) // length * length].view(-1, length)
    wanted = 1 if count is None else count
    if len(windows) < wanted:
        raise DataError(
            f"the {split} text of {str(source)!r} has {len(windows)} windows of {length} tokens, "
            f"not {wanted}: ask for fewer or shorter ones, or give a longer text"
        )
    if count is None:
        return windows
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]]


def hold_out(ids: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return windows (N, L) without some ``count`` of them, drawn with ``seed``, and those; DataError for too few.

    >>> [len(part) for part in hold_out(torch.zeros(8, 4).long(), 2)]
    [6, 2]
    """
    if len(ids) <= count:
        raise DataError(f"{len(ids)} windows leave none when {count} are held out: hold out fewer, or give more text")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order[count:].sort().values], ids[order[:count]]


def _recall(path: Path) -> list[list[str]] | None:
    """The names and texts of a file of the cache, or None where it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
        return found["documents"] if found["sha256"] == _seal(found["documents"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seal(documents: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


def _read_library() -> Iterator[list[str]]:
    places: dict[str, tuple[str, int]] = {}  # where each paragraph, its blanks aside, occurs first
    for name, text in sorted([*_read_topics(), *_read_docstrings()]):
        parts = ((part, (name, i)) for i, part in enumerate(paragraphs(text)))
        own = [part for part, place in parts if places.setdefault("".join(part.split()), place) == place]
        if own:
            yield [name, "\n\n".join(own)]


def _read_topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    return ((f"topics/{name}", text) for name, text in topics.items())


def _read_docstrings() -> Iterator[tuple[str, str]]:
    root = Path(ast.__file__).parent
    for path in root.rglob("*.py"):
        inner = path.relative_to(root).with_suffix("")
        if _SKIPPED.isdisjoint(inner.parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in a library's source are its own affair
                tree = ast.parse(path.read_bytes())
            module = ".".join(part for part in inner.parts if part != "__init__")
            yield f"docstrings/{module}", "\n\n".join(_find_docstrings(tree))


def _find_docstrings(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _find_docstrings(child)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""


def _stream(source: str, split: str, seed: int) -> Iterator[str]:
    from datasets import load_dataset

    repository, configuration, column, test = HUB[source]
    try:
        rows = load_dataset(repository, configuration, split=test if split == "test" else "train", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=10_000):
            yield row[column]
    except OSError as error:
        raise DataError(
            f"{source!r} cannot be read ({str(error).splitlines()[0]}): without a network, give the path of a "
            "text file, or 'stdlib', instead"
        ) from error


def _read_file(path: Path) -> list[Document]:
    try:
        found = paragraphs(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"no text in {str(path)!r} ({error.strerror}): give a file, or 'stdlib'") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 at byte {error.start}: convert it") from error
    return [Document(part, part) for part in dict.fromkeys(found)]
