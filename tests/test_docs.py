"""What the documentation says runs: code blocks, commands, and an example for every public name."""

import inspect
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

import s3lab
from s3lab.lab.options import make_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@every_page
def test_python_blocks_run_in_their_order(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@every_page
def test_commands_are_those_of_the_command_line(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line)
        if "s3lab" in words:
            make_parser(defaultdict(lambda: print)).parse_args(words[words.index("s3lab") + 1 :])
        else:
            assert words[0] == "make" and set(words[1:]) <= targets, line


@every_page
def test_code_is_checked_or_plainly_text(page):
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh", "text"} and set(fences[1::2]) <= {""}


def test_every_form_in_the_grammar_is_read_back():
    page = (ROOT / "docs" / "grammar.md").read_text().replace("\\|", "|")
    texts = [text for text in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) if text != "text"]
    assert len(texts) > 20
    for text in texts:
        assert s3lab.parse(str(s3lab.parse(text))) == s3lab.parse(text)


def test_every_page_is_in_the_navigation():
    def leaves(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]

    told = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(told) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)


def test_every_solver_has_a_card():
    page = (ROOT / "docs" / "solvers.md").read_text()
    assert {f"## {name}\n" for name in s3lab.SOLVERS} <= set(re.findall(r"## \w+\n", page))


def test_every_figure_is_told_how_to_read():
    page = (ROOT / "docs" / "how-to" / "read-the-figures.md").read_text()
    assert {path.stem for path in (ROOT / "figures").glob("*.png")} <= set(re.findall(r"`(\w+)`", page))


@pytest.mark.parametrize("name", s3lab.__all__)
def test_every_public_name_says_what_it_is_and_has_an_example(name):
    thing = getattr(s3lab, name)
    if not callable(thing):
        return
    told = inspect.getdoc(thing) or ""
    assert thing.__doc__ and told.split(".")[0]
    if isinstance(thing, type) and issubclass(thing, s3lab.S3Error):
        assert "raised" in told.lower()
    else:
        assert ">>> " in told
