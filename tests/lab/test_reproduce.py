import io
import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from s3lab.errors import DataError
from s3lab.lab import cli, reproduce

MAKES = """
import json, os, pathlib
folder = pathlib.Path(os.environ["S3LAB_FIGURES"])
(folder / "made.csv").write_text(str(size))
(folder / "made.json").write_text(json.dumps({"sha256": {"made.csv": ""}}))
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository of two notebooks, the first of which fails."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    sources = {"00_break_early": ("size = 1", "1 / 0", "2"), "01_make_file": ("size = 1\nname = 'a'", MAKES)}
    for name, (parameters, *rest) in sources.items():
        first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        book = new_notebook(cells=[first, *map(new_code_cell, rest)], metadata=kernel)
        nbformat.write(book, folder / f"{name}.ipynb")
    (folder / "profiles" / "quick.yaml").write_text("00_break_early:\n01_make_file: {size: 7}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_failing_notebook_is_kept_and_does_not_stop_the_next(house, capsys):
    progress = io.StringIO()
    first, second = reproduce.reproduce(out="made", progress=progress)
    assert first.error == "ZeroDivisionError: division by zero" and first.made == ()
    assert second.error is None and [path.name for path in second.made] == ["made.csv", "made.json"]
    assert (house / "made" / "made.csv").read_text() == "7"
    failed = nbformat.read(house / "made" / "runs" / "00_break_early.ipynb", as_version=4)
    assert any(o.output_type == "error" for cell in failed.cells for o in cell.get("outputs", []))
    assert "5/5" in progress.getvalue()
    summary = reproduce.summarise([first, second], "made")
    assert "FAILED: ZeroDivisionError" in summary and "made (.csv .json)" in summary
    assert "1 of 2 notebooks ran" in summary and "files made in made/: 2" in summary


def test_the_exit_status_says_whether_all_ran(house):
    assert cli.main(["reproduce", "01", "--out", "made"]) == 0
    assert json.loads((house / "made" / "made.json").read_text())
    assert cli.main(["reproduce", "00", "--out", "made"]) == 1


def planned(*names, profile="quick"):
    return [(job.name, job.parameters) for job in reproduce.plan(names, profile, "notebooks")]


def test_a_plan_is_in_the_order_of_the_numbers(house):
    assert planned() == [("00_break_early", {}), ("01_make_file", {"size": 7})]


@pytest.mark.parametrize("name", ["01", "01_make_file", "notebooks/01_make_file.ipynb"])
def test_a_notebook_is_named_by_number_name_or_path(house, name):
    assert planned(name) == [("01_make_file", {"size": 7})]


def test_a_list_of_sets_runs_a_notebook_once_for_each(house):
    (house / "mine.yaml").write_text("01_make_file: [{size: 1}, {size: 2}]")
    assert planned(profile="mine.yaml") == [("01_make_file-1", {"size": 1}), ("01_make_file-2", {"size": 2})]


def test_a_profile_may_be_a_file_and_name_some_only(house):
    (house / "mine.yaml").write_text("01_make_file: {name: b}")
    assert planned(profile="mine.yaml") == [("01_make_file", {"name": "b"})]
    assert planned("00", profile="mine.yaml") == [("00_break_early", {})]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("01_make_file: {sise: 7}", "01_make_file has no parameter sise; it has size, name"),
        ("07_gone: {}", "no notebook 07_gone; there are 00_break_early, 01_make_file"),
        ("- 1", "must map each notebook"),
        ("01_make_file: 3", "must map each notebook"),
        ("01_make_file: []", "must map each notebook"),
        ("01_make_file: [{sise: 7}]", "01_make_file has no parameter sise"),
        ("a: [", "is not YAML"),
        ("{}", "names no notebook"),
    ],
)
def test_a_wrong_profile_is_refused_before_anything_runs(house, profile, message, capsys):
    (house / "wrong.yaml").write_text(profile)
    assert cli.main(["reproduce", "--profile", "wrong.yaml", "--out", "made"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("s3lab: ") and message in complaint
    assert not (house / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["09"], "no notebook 09"), (["--profile", "full"], "no profile full: .* name one of quick")],
)
def test_a_wrong_name_is_answered_with_the_right_ones(house, arguments, message, capsys):
    assert cli.main(["reproduce", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_notebooks_it_says_where_to_stand(tmp_path):
    with pytest.raises(DataError, match="at the root of the repository"):
        reproduce.plan([], "quick", tmp_path)


@pytest.mark.parametrize("line", ["size = open('a')", "print(1)", "size: int = 1", "a.b = 1", "size ="])
def test_parameters_are_literals(house, line):
    path = house / "notebooks" / "00_break_early.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[0].source = line
    nbformat.write(book, path)
    with pytest.raises(DataError, match="is no `name = literal`"):
        reproduce.read_parameters(path)


def test_a_notebook_without_parameters_cell_is_refused(house):
    path = house / "notebooks" / "00_break_early.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), path)
    with pytest.raises(DataError, match="0 cells tagged 'parameters'"):
        reproduce.read_parameters(path)


def test_help_shows_how(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "--help"])
    assert stop.value.code == 0
    assert "s3lab reproduce 02 --profile paper" in capsys.readouterr().out


def test_no_command_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
