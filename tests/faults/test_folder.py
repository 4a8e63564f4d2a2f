"""A folder for results: whose it may be, one process at a time, and no trace where nothing was made."""

import os
import signal

import pytest

from s3lab.errors import DataError
from s3lab.folder import LOCK, MARK, check_folder, claim


def fill(folder, name="README.md"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("name", ["README.md", "config.json", "manifest.json", ".hidden", "run"])
def test_files_of_others_are_left_alone(tmp_path, name):
    folder = fill(tmp_path / "mine", name)
    with pytest.raises(DataError, match=f"did not make \\({name}\\): .* --force"), claim(folder):
        pytest.fail("it was claimed")
    assert os.listdir(folder) == [name] and (folder / name).read_text() == "mine"


def test_a_folder_is_one_s_own_when_it_is_new_empty_or_made_by_s3lab(tmp_path):
    with claim(tmp_path / "a" / "new"):
        fill(tmp_path / "a" / "new", "result")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a" / "new", tmp_path / "empty", fill(tmp_path / "pruned", "s3lab.json")):
        with claim(folder):
            pass
    assert (tmp_path / "a" / "new" / "result").read_text() == "mine"


def test_force_takes_a_folder_of_others_and_from_then_on_it_is_s3lab_s(tmp_path):
    folder = fill(tmp_path / "mine")
    with claim(folder, force=True):
        pass
    check_folder(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_where_nothing_is_made_nothing_is_left(tmp_path):
    def fail():
        with claim(tmp_path / "a" / "b"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_had_begun_is_swept_and_nothing_else(tmp_path):
    with claim(tmp_path):
        fill(tmp_path / "run", "kept.part")
        fill(tmp_path / "run", ".a.json.123.s3lab.part")
        fill(tmp_path / ".model.s3lab.part", "config.json")
    with claim(tmp_path):
        assert [path.name for path in tmp_path.rglob("*.part")] == ["kept.part"]


def test_the_second_is_told_who_holds_it_and_a_crash_releases(tmp_path):
    out = tmp_path / "out"
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        with claim(out):
            os.write(write, b"!")
            signal.pause()
    os.read(read, 1)
    try:
        with pytest.raises(DataError, match=rf"'{out}' is in use by process {pid} on .* since \d{{4}}-"), claim(out):
            pytest.fail("it was claimed")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert {MARK, LOCK} <= set(os.listdir(out))
    with claim(out):
        fill(out, "result")


def test_one_that_has_not_said_who_it_is_is_another_process(tmp_path):
    with claim(tmp_path):
        (tmp_path / MARK).write_text("{}")
        with pytest.raises(DataError, match="in use by another process"), claim(tmp_path):
            pytest.fail("it was claimed")
