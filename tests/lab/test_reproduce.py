"""Plans, runs, what is skipped, what stops: on notebooks of a few lines in a folder of their own."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from s3lab.errors import DataError
from s3lab.files import write
from s3lab.lab import cli
from s3lab.lab.run import fresh, grid, reproduce, schedule
from s3lab.lab.run import job as module
from s3lab.lab.run.job import Job, Outcome
from s3lab.lab.run.notebook import read_parameters

# Writes a table and its record, as `record.start` does, without the seconds that the import of torch takes; with a
# size from 2 on only if a file called "open" is there, and otherwise never ends.
MAKES = """
import hashlib, json, os, pathlib, threading
folder = pathlib.Path(os.environ["S3LAB_FIGURES"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "begun").write_text(str(os.getpid()))
size < 2 or size > 6 or pathlib.Path("open").exists() or threading.Event().wait()
(folder / "made.csv").write_text(f"{size} {os.environ.get('OMP_NUM_THREADS')}")
(folder / "made.json").write_text(json.dumps({
    "notebook": "notebooks/01_make_file.ipynb",
    "parameters": {"size": size, "name": name},
    "sha256": {"made.csv": hashlib.sha256((folder / "made.csv").read_bytes()).hexdigest()},
}))
"""
READS = """
import os, pathlib
print((pathlib.Path(os.environ["S3LAB_FIGURES"]) / "made.csv").read_text())
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository of three notebooks: one fails, one makes a file, one can read what runs made."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    sources = {
        "00_break_early": ("count = 1", "1 / 0", "2"),
        "01_make_file": ("size = 1\nname = 'a'", MAKES),
        "02_read_file": ("runs = ['a']", READS),
    }
    for name, (parameters, *rest) in sources.items():
        first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        book = new_notebook(cells=[first, *map(new_code_cell, rest)], metadata=kernel)
        nbformat.write(book, folder / f"{name}.ipynb")
    (folder / "profiles" / "quick.yaml").write_text("00_break_early:\n01_make_file: {size: 7}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


@pytest.fixture
def job(house):
    return reproduce.plan(["01"], "quick", "notebooks")[0]


def test_a_failing_notebook_is_kept_and_does_not_stop_the_next(house, capsys):
    progress = io.StringIO()
    first, second = reproduce.reproduce(out="made", progress=progress)
    assert first.error == "ZeroDivisionError: division by zero" and first.made == ()
    assert second.error is None and [path.name for path in second.made] == ["made.csv", "made.json"]
    assert (house / "made" / "made.csv").read_text() == "7 None"
    failed = nbformat.read(house / "made" / "runs" / "00_break_early.ipynb", as_version=4)
    assert any(o.output_type == "error" for cell in failed.cells for o in cell.get("outputs", []))
    assert "100%" in progress.getvalue() and "00:00 left" in progress.getvalue()
    summary = reproduce.summarise([first, second], "made")
    assert "FAILED: ZeroDivisionError" in summary and "made (.csv .json)" in summary
    assert "1 of 2 notebooks ran" in summary and "files made in made/: 2" in summary


def test_the_bar_weighs_a_notebook_by_the_time_its_record_tells(house, job):
    out = house / "made"
    unknown = schedule._Bar([job], out, io.StringIO())
    assert unknown.bar.total == 5 * unknown.cells[job.name]
    reproduce.reproduce(["01"], out=out, progress=io.StringIO())
    record = out / "made.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"time_s": 1234.0}))
    assert schedule._Bar([job], out, io.StringIO()).bar.total == 1234


def test_another_profile_than_quick_has_a_folder_of_its_own(house, capsys):
    (house / "notebooks" / "profiles" / "large.yaml").write_text("01_make_file: {size: 9}\n")
    assert cli.main(["reproduce", "--profile", "large"]) == 0
    assert (house / "figures" / "large" / "made.csv").read_text() == "9 None"


def test_the_exit_status_says_whether_all_ran(house, capsys):
    assert cli.main(["reproduce", "01", "--out", "made"]) == 0
    first = (house / "made" / "made.json").stat().st_mtime_ns
    assert cli.main(["reproduce", "00", "01", "--out", "made"]) == 1
    assert (house / "made" / "made.json").stat().st_mtime_ns == first
    assert "01_make_file    up to date  made (.csv .json)" in capsys.readouterr().out


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
        ("07_gone: {}", "no notebook 07_gone; there are 00_break_early, 01_make_file, 02_read_file"),
        ("01_make_file: {name: 2:4}", "name of 01_make_file is a text, and YAML reads 124"),
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
    [
        (["09"], "no notebook 09"),
        (["--profile", "full"], "no profile full: .* name one of quick"),
        (["--set", "sise=3"], "none of 00_break_early, 01_make_file has a parameter sise"),
        (["--set", "size"], "--set 'size' is no name=value"),
        (["--set", "size=1", "--set", "size=2"], "--set size is given twice: '1' and '2'"),
        (["--grid", "size=1,1"], "two points of the grid have the folder size=1"),
        (["02", "--grid", "size=1,2"], "02_read_file has no parameter size; it has runs"),
        (["--dask", "nowhere"], "no Dask scheduler answers at 'nowhere'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(house, arguments, message, capsys):
    assert cli.main(["reproduce", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_value_is_read_as_the_parameter_is():
    assert [grid.read_value(text, 0) for text in ("7", "0.5", "[1, 2]", "auto")] == [7, 0.5, [1, 2], "auto"]
    assert [grid.read_value(text, "") for text in ("7", "2:4")] == ["7", "2:4"]


def test_values_reach_the_notebooks_that_have_them(house):
    jobs = reproduce.plan([], "quick", "notebooks", values=["name=8:16"])
    assert [job.parameters for job in jobs] == [{}, {"size": 7, "name": "8:16"}]


def test_a_grid_is_every_combination_in_a_folder_of_its_own(house):
    jobs = reproduce.plan([], "quick", "notebooks", values=["size=3"], grid=["name=2:4,50%/row,f(1,2)"])
    assert [(job.name, job.point, job.parameters) for job in jobs] == [
        ("01_make_file@name=2-4", "name=2-4", {"size": 3, "name": "2:4"}),
        ("01_make_file@name=50%-row", "name=50%-row", {"size": 3, "name": "50%/row"}),
        ("01_make_file@name=f-1-2-", "name=f-1-2-", {"size": 3, "name": "f(1,2)"}),
    ]
    jobs = reproduce.plan([], "quick", "notebooks", grid=["size=1,2"])
    assert [job.parameters for job in jobs] == [{"size": 1, "name": "1"}, {"size": 2, "name": "2"}]


def test_what_is_set_takes_the_place_of_sets_that_differ_in_it(house):
    (house / "mine.yaml").write_text("01_make_file: [{size: 1, name: b}, {size: 2, name: b}]")
    (job,) = reproduce.plan([], "mine.yaml", "notebooks", values=["size=5"])
    assert (job.name, job.parameters) == ("01_make_file", {"size": 5, "name": "b"})
    jobs = reproduce.plan([], "mine.yaml", "notebooks", values=["name=c"])
    assert [job.parameters for job in jobs] == [{"size": 1, "name": "c"}, {"size": 2, "name": "c"}]


def test_a_job_needs_those_whose_names_are_among_its_runs(house):
    (house / "mine.yaml").write_text("01_make_file: [{name: a}, {name: b}, {name: c}]\n02_read_file: {runs: [a, c]}")
    *_, reader = reproduce.plan([], "mine.yaml", "notebooks")
    assert reader.needs == ("01_make_file-1", "01_make_file-3")


def outcome(job, error=None):
    return Outcome(job, (), 0.0, error)


@pytest.mark.parametrize("workers", [1, 3])
def test_jobs_run_after_those_they_need_and_not_at_all_if_those_fail(house, monkeypatch, workers):
    path = house / "notebooks" / "01_make_file.ipynb"
    needs = {"reads a": "a", "a": "", "reads broken": "broken", "reads that": "reads broken", "broken": "", "b": ""}
    jobs = [Job(path, {}, name, needs=(need,) if need else ()) for name, need in needs.items()]
    ran = []

    def run(job, *_, **__):
        ran.append(job.name)
        return outcome(job, "it broke" if job.name == "broken" else None)

    monkeypatch.setattr(schedule, "run", run)
    outcomes = schedule.run_all(jobs, house, workers, progress=io.StringIO())
    assert sorted(ran) == ["a", "b", "broken", "reads a"] and ran.index("a") < ran.index("reads a")
    assert [outcome.job.name for outcome in outcomes] == list(needs)
    errors = {outcome.job.name: outcome.error for outcome in outcomes if outcome.error}
    assert errors.keys() == {"broken", "reads broken", "reads that"} and "tables of broken" in errors["reads broken"]


def test_an_error_of_the_machine_is_an_outcome_too(house, job, monkeypatch):
    def run(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(schedule, "run", run)
    (found,) = schedule.run_all([job], house, progress=io.StringIO())
    assert found.error == "OSError: no space left on device"


def test_jobs_that_need_each_other_are_refused(house, job):
    jobs = [replace(job, name="a", needs=("b",)), replace(job, name="b", needs=("a",))]
    with pytest.raises(DataError, match="read each other's tables"):
        schedule.run_all(jobs, house)


@pytest.fixture
def executions(monkeypatch):
    """Names of the jobs that are executed, without a kernel: the figures are made at once."""
    done = []

    def execute(notebook, to, variables, stop):
        done.append(notebook.name)
        folder = Path(variables["S3LAB_FIGURES"])
        full = read_parameters(notebook.notebook) | notebook.parameters
        for name in ("one", "two"):
            write(folder / f"{name}.csv", str(full).encode())
            hashes = {f"{name}.csv": hashlib.sha256(str(full).encode()).hexdigest()}
            record = {"notebook": "notebooks/01_make_file.ipynb", "parameters": full, "sha256": hashes}
            write(folder / f"{name}.json", json.dumps(record).encode())

    monkeypatch.setattr(module, "_execute", execute)
    monkeypatch.setattr(fresh, "hash_source", lambda package: (package / "__init__.py").read_text())
    return done


def test_what_is_up_to_date_is_skipped_unless_forced(house, job, executions):
    first, second, forced = (module.run(job, house / "made", force=force) for force in (False, False, True))
    assert len(executions) == 2 and [o.skipped for o in (first, second, forced)] == [False, True, False]
    assert first.made == second.made == forced.made and len(first.made) == 4


def change_code(house, job):
    book = nbformat.read(job.notebook, as_version=4)
    book.cells[-1].source += "\n1"
    nbformat.write(book, job.notebook)


def change_text(house, job):
    book = nbformat.read(job.notebook, as_version=4)
    book.cells.append(new_markdown_cell("Read it so."))
    nbformat.write(book, job.notebook)


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (change_code, True),
        (change_text, False),
        (lambda house, job: job.parameters.update(size=3), True),
        (lambda house, job: (house / "made" / "one.csv").write_text("0"), True),
        (lambda house, job: (house / "made" / "two.csv").unlink(), True),
        (lambda house, job: (house / "made" / "two.json").unlink(), True),
        (lambda house, job: (house / "notebooks" / "data.txt").write_text("other"), True),
        (lambda house, job: (house / "made" / "other.json").write_text("[]"), False),
    ],
)
def test_any_input_or_file_that_changed_is_redone(house, job, executions, change, redone):
    (house / "notebooks" / "data.txt").write_text("text")
    job.parameters["name"] = "data.txt"
    module.run(job, house / "made")
    change(house, job)
    assert module.run(job, house / "made").skipped is not redone


def test_a_change_of_the_package_is_redone(house, job, executions, monkeypatch):
    module.run(job, house / "made")
    monkeypatch.setattr(fresh, "hash_source", lambda package: "another")
    assert not module.run(job, house / "made").skipped


def test_the_hash_of_a_package_is_that_of_what_its_files_do(tmp_path):
    write(tmp_path / "a" / "b.py", b"f(1)")
    first = fresh.hash_source(tmp_path)
    write(tmp_path / "a" / "__pycache__" / "b.pyc", b"2")
    write(tmp_path / "a" / ".b.py.swp", b"3")
    assert fresh.hash_source(tmp_path) == first
    (tmp_path / "a" / "b.py").rename(tmp_path / "c.py")
    write(tmp_path / "c.py", b"'''On f.'''\nfrom a import f  # where it is now\n\nf(1)")
    assert fresh.hash_source(tmp_path) == first
    write(tmp_path / "c.py", b"from a import f\n\nf(2)")
    assert fresh.hash_source(tmp_path) != first
    write(tmp_path / "c.py", b"from a import f\n\nf(1)")
    write(tmp_path / "table.csv", b"1")
    assert fresh.hash_source(tmp_path) != first


def test_a_run_that_failed_after_its_figures_is_redone(house, job, executions, monkeypatch):
    made = module._execute
    monkeypatch.setattr(module, "_execute", lambda *given: made(*given) or "ValueError: a check")
    assert module.run(job, house / "made").error
    monkeypatch.setattr(module, "_execute", made)
    assert not module.run(job, house / "made").skipped


def test_a_reader_is_redone_when_the_tables_it_reads_have_changed(house, job, executions):
    reader = Job(house / "notebooks" / "02_read_file.ipynb", {}, "02_read_file")

    def inputs():
        return fresh.hash_inputs(reader.notebook, {"runs": ["a"]}, house / "made")

    module.run(job, house / "made")
    before = inputs()
    assert {"one.csv", "two.csv"} <= before.keys()
    (house / "made" / "two.csv").write_text("other")
    assert {name for name, value in inputs().items() if value != before[name]} == {"two.csv"}


@contextmanager
def start(*arguments):
    """Start a command that an interrupt interrupts, even if these tests run where that is ignored; kill it at last."""
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listen}; from s3lab.lab.cli import main; raise SystemExit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, "reproduce", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_interrupted_grid_goes_on_with_what_is_missing(house):
    arguments = ("--grid", "size=0,1,2,3", "--jobs", "2", "--out", "made")
    done, under_way = ([house / "made" / f"size={i}" for i in pair] for pair in ((0, 1), (2, 3)))
    with start(*arguments) as process:
        while process.poll() is None and not all((folder / "begun").exists() for folder in under_way):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    for folder in under_way:
        assert not (folder / "made.csv").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / "begun").read_text()), 0)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(folder / "made.csv").read_text() for folder in done] == [f"{size} {share}" for size in (0, 1)]
    times = [(folder / "made.json").stat().st_mtime_ns for folder in done]

    (house / "notebooks" / "open").touch()
    with start(*arguments) as process:
        told, _ = process.communicate()
    assert process.returncode == 0 and told.count("up to date  made") == 2
    assert "2 of 4 notebooks ran" in told
    assert [(folder / "made.json").stat().st_mtime_ns for folder in done] == times


def test_a_job_is_stopped_where_interrupts_are_ignored(house, job):
    class Begun(Event):
        def wait(self, timeout=None):
            return super().wait(timeout) or (house / "made" / "begun").exists()

    job.parameters.update(size=2)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = module.run(job, house / "made", stop=Begun())
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.error == "KeyboardInterrupt" and not found.made


@pytest.mark.slow
def test_a_dask_cluster_runs_a_grid(house):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        arguments = ("--grid", "size=0,1", "--out", "made", "--dask", cluster.scheduler_address)
        with start(*arguments) as process:
            told, _ = process.communicate()
    assert process.returncode == 0 and "2 of 2 notebooks ran" in told
    assert [(house / "made" / f"size={size}" / "made.csv").read_text().split()[0] for size in (0, 1)] == ["0", "1"]


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
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
