import subprocess
from pathlib import Path

import pytest

from training import provenance


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    process = subprocess.run(
        ["git", *author, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return process.stdout.strip()


def test_rows_of_results_are_no_change_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, program, other = (
        tmp_path / "training/results.csv",
        tmp_path / "training/a.py",
        tmp_path / "b",
    )
    monkeypatch.setattr(provenance, "RESULTS", results)
    results.parent.mkdir()
    for file in (results, program, other):
        file.write_text("first\n")
    assert provenance.commit() == "unknown"
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "of a repository around the program's folder")
    assert provenance.commit() == "unknown"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert len(head) == 40
    assert provenance.commit() == head
    results.write_text("first\nsecond\n")
    (tmp_path / "new").touch()
    assert provenance.commit() == head
    for file in (program, other):
        file.write_text("second\n")
        assert provenance.commit() == f"{head}-dirty"
        file.write_text("first\n")
