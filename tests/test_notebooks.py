"""The rules of a notebook: one question, its parameters in one cell, little code, no output but checks."""

import ast
from pathlib import Path

import nbformat
import pytest

from s3lab.lab.run import reproduce

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROFILES = sorted((FOLDER / "profiles").glob("*.yaml"))
CHECK_TAGS = {"keep_output", "nbval-check-output"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def code(path: Path) -> ast.Module:
    return ast.parse("\n".join(cell.source for cell in cells(path)))


def test_names_say_what_the_notebook_does():
    names = [path.stem for path in NOTEBOOKS]
    assert names and len({name[:2] for name in names}) == len(names)
    assert all(name[:2].isdigit() and name[2:].count("_") >= 2 and name.islower() for name in names)


@every_notebook
def test_it_opens_with_its_question_and_closes_with_a_reading(path):
    everything = nbformat.read(path, as_version=4).cells
    assert everything[0].cell_type == "markdown" and "?" in everything[0].source
    assert everything[-1].cell_type == "markdown"


@every_notebook
def test_the_first_code_is_its_parameters_one_literal_a_line(path):
    first = cells(path)[0]
    assert tags(first) == {"parameters"}
    assert len(reproduce.read_parameters(path)) == len(first.source.splitlines())


@every_notebook
def test_the_record_has_its_name_and_all_its_parameters(path):
    (start,) = [node for node in ast.walk(code(path)) if isinstance(node, ast.Call) and is_start(node)]
    name, given = start.args
    assert ast.literal_eval(name) == path.stem
    assert isinstance(given, ast.Call) and ast.unparse(given.func) == "dict" and not given.args
    assert {k.arg: ast.unparse(k.value) for k in given.keywords} == {
        key: key for key in reproduce.read_parameters(path)
    }


def is_start(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "record.start"


@every_notebook
def test_it_has_little_code(path):
    lines = [line for cell in cells(path) for line in cell.source.splitlines() if line.strip()]
    assert len([line for line in lines if not line.lstrip().startswith(("#", "from ", "import "))]) <= 57
    for node in ast.walk(code(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 3, f"{node.name} is too long"


@every_notebook
def test_it_imports_packages_only(path):
    source = "\n".join(cell.source for cell in cells(path))
    assert "sys.path" not in source and "%run" not in source
    for node in ast.walk(code(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not {other.stem for other in NOTEBOOKS} & set(ast.unparse(node).split())


@every_notebook
def test_it_is_stripped_but_for_its_checks(path):
    checks = [cell for cell in cells(path) if tags(cell) & CHECK_TAGS]
    assert checks, "a notebook without a check proves nothing"
    for cell in cells(path):
        assert cell.execution_count is None
        if cell in checks:
            assert tags(cell) == CHECK_TAGS and cell.outputs
            assert all(output.output_type == "stream" for output in cell.outputs)
            assert sum(len(output.text.splitlines()) for output in cell.outputs) <= 12
        else:
            assert not cell.outputs and not tags(cell) - {"parameters"}


@every_notebook
def test_the_quick_profile_runs_it(path):
    assert path.stem in reproduce.read_profile("quick", FOLDER)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_sets_parameters_that_are_there(profile):
    assert reproduce.plan([], profile.stem, FOLDER)


def test_no_two_notebooks_make_the_same_file():
    made: dict[str, str] = {}
    for path in NOTEBOOKS:
        for node in ast.walk(code(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("run.table", "run.figure"):
                name = ast.unparse(node.args[1])
                assert made.setdefault(name, path.stem) == path.stem
