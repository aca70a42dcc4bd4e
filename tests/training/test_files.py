import os
import time
from pathlib import Path

import pytest

from tests.disk import room_for
from training.files import LEFTOVER_SECONDS, replacing


def test_an_error_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail()
    assert path.read_bytes() == b"old"
    assert [other.name for other in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_says_which_file_it_has_no_room_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        room_for(100),
        pytest.raises(OSError, match="File too large") as told,
        replacing(path) as file,
    ):
        file.write(b"new" * 100)
    assert told.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_brought_to_the_disk_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    beside = tmp_path / f"file.{os.getpid()}.new"
    os.mkfifo(beside)  # can be written to, but not synced
    reader = os.open(beside, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="Invalid argument"), replacing(path) as file:
            file.write(b"new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert path.is_file()
    assert path.read_bytes() == b"old"


def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    path = tmp_path / "file[1]"
    left, written, foreign = (tmp_path / f"file[1].{part}" for part in ("1.new", "2.new", "mine.new"))
    for other in (left, written, foreign):
        other.write_bytes(b"half")
    long_ago = time.time() - LEFTOVER_SECONDS - 1
    for other in (left, foreign):
        os.utime(other, (long_ago, long_ago))
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert set(tmp_path.iterdir()) == {path, written, foreign}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    path, link = tmp_path / "there" / "file", tmp_path / "link"
    path.parent.mkdir()
    path.write_bytes(b"old")
    link.symlink_to("there/file")
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
