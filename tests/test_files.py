"""A file is there whole or not at all."""

from pathlib import Path

import pytest

from s3lab.files import replacing, write


def test_a_file_and_its_folder_appear(tmp_path):
    write(tmp_path / "new" / "a.csv", b"text")
    assert (tmp_path / "new" / "a.csv").read_bytes() == b"text"


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    write(tmp_path / "a.csv", b"old")

    def fail(self, data):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a.csv", b"new")
    assert (tmp_path / "a.csv").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_part_that_was_begun_is_not_taken_for_the_file(tmp_path):
    def stop():
        with replacing(tmp_path / "a.csv") as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not list(tmp_path.iterdir())
