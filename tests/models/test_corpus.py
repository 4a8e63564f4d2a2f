"""The built-in text: clean, divided for good, and read without running anything; files and the hub beside it."""

import hashlib
import os
import subprocess
import sys
from itertools import combinations, islice
from typing import TYPE_CHECKING, cast

import pytest
import torch

from s3lab.errors import DataError
from s3lab.models.text import corpus
from s3lab.models.text.corpus import SPLITS, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text, **options):
        return [ord(letter) for letter in text]


LETTERS = cast("PreTrainedTokenizerBase", Letters())


def bare(paragraph):
    return "".join(paragraph.split())


def test_no_paragraph_occurs_twice_so_the_splits_share_none():
    found = {split: [bare(part) for part in corpus.paragraphs(corpus.text(split))] for split in SPLITS}
    for split, parts in found.items():
        assert len(parts) == len(set(parts)), split
    for one, other in combinations(SPLITS, 2):
        assert not set(found[one]) & set(found[other])


def test_the_splits_are_the_documents_in_order():
    for split in SPLITS:
        chosen = [document.text for document in corpus.documents() if document.split == split]
        assert corpus.text(split) == "\n\n".join(chosen)


def test_a_split_hangs_on_the_hash_of_the_name_alone():
    # The hashes are coreutils': printf topics/assert | b2sum -l 32 gives 2d513370, that is 0.177 of 2^32.
    known = {
        "docstrings/typing": "test",  # 07f35a5d, 0.031
        "topics/assert": "calibration",  # 2d513370, 0.177
        "topics/class": "train",  # 3d97a963, 0.241
        "docstrings/shelve": "train",  # eb15b06a, 0.918
    }
    for name, split in known.items():
        assert Document(name, "").split == Document(name, "other words").split == split


def test_the_text_is_clean():
    for document in corpus.documents():
        assert document.text.strip() and "\n\n\n" not in document.text
        lines = document.text.split("\n")
        assert all(line.isprintable() and line == line.rstrip() for line in lines), document.name


def test_it_holds_the_language_reference_and_the_docstrings_but_no_tests():
    texts = {document.name: document.text for document in corpus.documents()}
    assert list(texts) == sorted(texts)
    assert "Escape sequences" in texts["topics/strings"]
    assert "Heap queue algorithm" in texts["docstrings/heapq"]
    assert not [name for name in texts if {"test", "tests", "idle_test"} & set(name.split("/")[1].split("."))]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and nothing read in this process."""
    monkeypatch.setenv("S3LAB_CACHE", str(tmp_path))
    corpus.documents.cache_clear()
    yield tmp_path
    corpus.documents.cache_clear()


def test_what_was_read_is_kept_and_read_again_where_it_is_damaged(cache, monkeypatch):
    monkeypatch.setattr(corpus, "_read_library", lambda: iter([["topics/a", "one"], ["topics/b", "two"]]))
    whole = corpus.documents()
    (path,) = cache.iterdir()
    good = path.read_bytes()

    def read_again():
        corpus.documents.cache_clear()
        return corpus.documents()

    monkeypatch.setattr(corpus, "_read_library", lambda: iter([["topics/c", "three"]]))
    assert read_again() == whole == (Document("topics/a", "one"), Document("topics/b", "two"))
    for bad in (good[:-9], good.replace(b"one", b"ore"), b"[]", b"{}", b""):
        path.write_bytes(bad)
        assert read_again() == (Document("topics/c", "three"),)


def test_a_cache_that_cannot_be_written_is_done_without(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("S3LAB_CACHE", str(cache / "file"))
    monkeypatch.setattr(corpus, "_read_library", lambda: iter([["topics/a", "one"]]))
    assert corpus.documents() == (Document("topics/a", "one"),)
    assert [path.name for path in cache.iterdir()] == ["file"]


def test_another_process_reads_the_same_and_runs_no_module():
    code = (
        "import hashlib, sys; from s3lab.models.text import corpus; before = set(sys.modules); "
        "text = corpus.text('test').encode(); "
        "print(hashlib.sha256(text).hexdigest(), *(set(sys.modules) - before))"
    )
    env = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    digest, *modules = run.stdout.split()
    assert digest == hashlib.sha256(corpus.text("test").encode()).hexdigest()
    assert set(modules) <= {"pydoc_data", "pydoc_data.topics"}


def test_windows_follow_each_other_in_the_text():
    ids = corpus.tokens(LETTERS, "test", 100)
    assert ids.dtype == torch.int64 and ids.shape[1] == 100
    text = "".join(map(chr, ids.flatten().tolist()))
    assert corpus.text("test").startswith(text) and len(corpus.text("test")) - len(text) < 100


def test_drawn_windows_are_distinct_and_follow_the_seed():
    whole = {tuple(row) for row in corpus.tokens(LETTERS, "test", 100).tolist()}
    drawn = corpus.tokens(LETTERS, "test", 100, count=50, seed=3)
    assert len(set(map(tuple, drawn.tolist())) & whole) == 50
    assert torch.equal(drawn, corpus.tokens(LETTERS, "test", 100, count=50, seed=3))
    assert not torch.equal(drawn, corpus.tokens(LETTERS, "test", 100, count=50, seed=4))


def test_a_local_file_is_split_by_its_paragraphs(tmp_path):
    path = tmp_path / "poem.txt"
    lines = [f"Line {i}, and\nits like." for i in range(400)]
    path.write_text("\n\n".join([*lines, lines[7]]) + "\n")
    parts = {split: corpus.paragraphs(corpus.text(split, path)) for split in SPLITS}
    assert sorted(line for part in parts.values() for line in part) == sorted(lines)
    shares = [len(parts[split]) / 400 for split in ("test", "calibration", "train")]
    assert shares == pytest.approx([0.08, 0.12, 0.80], abs=0.06)  # three deviations of a fair draw


@pytest.fixture
def hub(monkeypatch):
    """Five hundred numbered pages in place of the hub; what was asked of it is kept."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(repository, configuration, *, split, streaming):
        asked.append((repository, configuration, split))
        pages = [f"{split} page {i:03}" for i in range(500)]
        whole = datasets.Dataset.from_dict({"text": pages, "page": pages})
        return whole.to_iterable_dataset() if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("source", "repository", "splits"),
    [
        ("c4", ("allenai/c4", "en"), {"train": "train", "calibration": "train", "test": "validation"}),
        (
            "wikitext",
            ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"),
            {"calibration": "train", "test": "test"},
        ),
        ("wikitext-103", ("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1"), {"test": "test"}),
    ],
)
def test_the_hub_is_asked_for_its_own_splits(hub, source, repository, splits):
    for split, theirs in splits.items():
        pages = list(corpus.read(split, source))
        assert hub.pop() == (*repository, theirs)
        assert sorted(pages) == [f"{theirs} page {i:03}" for i in range(500)]


def test_the_hub_is_streamed_in_an_order_of_the_seed(hub):
    first, same, other = (list(islice(corpus.read("test", "c4", seed), 20)) for seed in (1, 1, 2))
    assert first == same and set(first) != set(other) and first != sorted(first)


def test_windows_of_the_hub_are_cut_from_the_stream(hub):
    text = "\n\n".join(corpus.read("calibration", "c4", seed=5))
    ids = corpus.tokens(LETTERS, "calibration", 30, count=4, seed=5, source="c4")
    assert sorted("".join(map(chr, row)) for row in ids.tolist()) == sorted(text[i : i + 30] for i in range(0, 120, 30))
    with pytest.raises(DataError, match=r"'c4' has .* windows of 30 tokens, not 1000"):
        corpus.tokens(LETTERS, "test", 30, count=1000, source="c4")


@pytest.mark.parametrize("source", ["c4", "wikitext", "wikitext-103"])
def test_without_a_network_the_hub_says_what_to_do(source):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=rf"'{source}' cannot be read \(.*\): without a network, give the path"):
        next(corpus.read("test", source))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: corpus.text("valid"), "no split is called 'valid': choose one of test, calibration"),
        (lambda: corpus.read("valid", "c4"), "no split is called 'valid'"),
        (lambda: corpus.text("test", "c4"), "'c4' is streamed, never read as a whole: ask for a number"),
        (lambda: corpus.tokens(LETTERS, "test", 9, source="c4"), "'c4' is streamed"),
        (lambda: corpus.text("test", "nowhere.txt"), "no text in 'nowhere.txt'"),
        (lambda: corpus.tokens(LETTERS, "test", 100, count=10**6), "windows of 100 tokens, not 1000000"),
        (lambda: corpus.tokens(LETTERS, "test", 10**9), "0 windows of 1000000000 tokens, not 1: ask"),
    ],
)
def test_what_is_not_there_is_named(ask, message):
    with pytest.raises(DataError, match=message):
        ask()


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        corpus.text("test", path)


def test_a_text_is_cut_by_share_between_documents_each_read_whole(tmp_path):
    file = tmp_path / "text.txt"
    parts = [f"{letter * 100}" for letter in "abcdefghij"]
    file.write_text("\n\n".join(parts))
    halves = [list(corpus.read("test", f"{file}[{cut}]")) for cut in (":50%", "50%:")]
    assert halves == [parts[:5], parts[5:]]
    assert list(corpus.read("calibration", f"{file}[20%:40%]")) == parts[2:4]
    cuts = ("[:30%]", "[30%:99%]", "[99%:]")
    joined = [text for cut in cuts for text in corpus.read("train", f"stdlib{cut}")]
    assert joined == [document.text for document in corpus.documents()]
