"""What the documentation says runs: code blocks, commands, and an example for every public name."""

import importlib.util
import inspect
import json
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
def test_commands_are_those_of_the_command_line(page, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)  # of the reader's machine, who is told to have some
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) *\?=", makefile, re.MULTILINE))
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line)
        if "s3lab" in words:
            make_parser(defaultdict(lambda: print)).parse_args(words[words.index("s3lab") + 1 :])
        else:
            set_to = {word.partition("=")[0] for word in words[1:] if "=" in word}
            assert words[0] == "make" and set_to <= variables, line
            assert {word for word in words[1:] if "=" not in word} <= targets, line


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


@pytest.mark.parametrize(("name", "known"), [("solvers", s3lab.SOLVERS), ("training", s3lab.METHODS)])
def test_every_method_has_a_card(name, known):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert {f"## {key}\n" for key in known} <= set(re.findall(r"## \w+\n", page))


def test_every_promise_has_its_test():
    page = (ROOT / "docs" / "promises.md").read_text()
    rows = re.findall(r"^\| (?!---)[^|]+ \|.*$", page, re.MULTILINE)
    promised = [row for row in rows if not re.search(r"\| test \|$", row)]
    assert len(promised) > 10
    for row in promised:
        named = re.findall(r"`([\w/]*test_\w+\.py)`", row)
        assert named and all((ROOT / name).exists() or (ROOT / "tests" / "faults" / name).exists() for name in named), (
            row
        )


def test_every_figure_is_told_how_to_read():
    page = (ROOT / "docs" / "how-to" / "read-the-figures.md").read_text()
    assert {path.stem for path in (ROOT / "figures").glob("*.png")} <= set(re.findall(r"`(\w+)`", page))


def load_hook(name: str):
    spec = importlib.util.spec_from_file_location(f"hook_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


def test_the_gallery_shows_each_figure_where_it_is_drawn():
    gallery, figures = load_hook("gallery"), ROOT / "figures"
    drawn = [path for path in figures.glob("*.json") if path.with_suffix(".png").exists()]
    makers = {path.stem: Path(json.loads(path.read_text())["notebook"]) for path in drawn}
    pages = {path.name: gallery.write_page(path, figures)[0] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for name, notebook in makers.items():
        assert pages[notebook.name].count(f"(../figures/{name}.png)") == 1, name


def test_docstrings_become_markdown():
    translate = load_hook("docstrings").translate
    assert translate("Use `prune`.\n\n>>> 1 + 1\n2") == (
        "Use [`prune`][s3lab.solvers.prune].\n\n```pycon\n>>> 1 + 1\n2\n```"
    )
    assert translate("batch\n    so many,\n    or one\norder\n    which") == (
        "`batch`\n:   so many,\n    or one\n\n`order`\n:   which"
    )
    assert translate("===  ===\n``a``  b\n===  ===").splitlines()[1] == "|---|---|"


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
        assert "Error" in told or thing is s3lab.Solution  # which is made, and not asked for
