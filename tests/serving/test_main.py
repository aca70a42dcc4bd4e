"""`python -m serving` as a process."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.server import service_environment
from serving.settings import BUNDLED_MODEL
from serving.version import version
from tests import ROOT
from tests.serving.models import METADATA, write_fragile_model, write_slow_model
from tests.serving.samples import pickled


def submit(folder: Path, *arguments: object, **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "serving", "submit", *map(str, arguments)],
        cwd=ROOT,
        env=service_environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def test_pickle(tmp_path: Path, images: npt.NDArray[np.uint8]) -> Path:
    path, images = tmp_path / "test.pkl", images[:300]
    ids = np.random.default_rng(1).permutation(len(images))
    path.write_bytes(pickled({b"data": images, b"ids": ids}, 4, old=True))
    return path


@pytest.fixture
def tiny(model_file: Callable[..., Path]) -> Path:
    """A model file that labels the images in no time."""
    return model_file()


def test_same_bytes_as_the_endpoint(client: httpx.Client, test_pickle: Path, tmp_path: Path) -> None:
    csv = tmp_path / "submission.csv"
    result = submit(tmp_path, test_pickle, csv, SERVING_PROVIDER="cpu")
    by = f"accurate {version(BUNDLED_MODEL.read_bytes())} on CPUExecutionProvider"
    assert (result.returncode, result.stdout) == (0, f"300 labels in {csv}, by {by}\n")
    assert "300/300" in result.stderr
    response = client.post("/submission", files={"file": test_pickle.read_bytes()})
    assert csv.read_bytes() == response.content
    assert csv.read_bytes().startswith(b"ID,Labels\n")


def test_replaces_a_file(tiny: Path, test_pickle: Path, tmp_path: Path) -> None:
    csv = tmp_path / "submission.csv"
    csv.write_text("old")
    assert submit(tmp_path, test_pickle, csv, "--model", tiny).returncode == 0
    assert csv.read_text().startswith("ID,Labels\n")
    assert not list(tmp_path.glob(".submission*"))


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(
    tiny: Path, test_pickle: Path, tmp_path: Path
) -> None:
    link, target = tmp_path / "link.csv", tmp_path / "there" / "target.csv"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    assert submit(tmp_path, test_pickle, link, "--model", tiny).returncode == 0
    assert link.is_symlink()
    assert target.read_text().startswith("ID,Labels\n")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pkl", "none.pkl: No such file"),
        ("text.pkl", "text.pkl: The file is not a pickle of protocol 2 to 5"),
        ("empty.pkl", "empty.pkl: data has no images"),
    ],
)
def test_a_bad_file_is_one_clean_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.pkl").write_text("hello")
    (tmp_path / "empty.pkl").write_bytes(pickle.dumps({"data": np.zeros((0, 3072), np.uint8)}))
    csv = tmp_path / "submission.csv"
    csv.write_text("old")
    result = submit(tmp_path, tmp_path / name, csv)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("python -m serving: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert csv.read_text() == "old"


@pytest.mark.parametrize(
    ("pixel", "message"),
    [(50, "tiny {} gave logits that are no finite numbers"), (200, "indices element out of")],
)
def test_a_model_that_fails_on_an_image(tmp_path: Path, pixel: int, message: str) -> None:
    images = np.full((5, 32, 32, 3), 100, np.uint8)
    images[3] = pixel
    (tmp_path / "test.pkl").write_bytes(pickle.dumps({"data": images}))
    csv = tmp_path / "a.csv"
    model = write_fragile_model(tmp_path)
    result = submit(tmp_path, tmp_path / "test.pkl", csv, "--model", model, SERVING_PROVIDER="cpu")
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith(
        "python -m serving: error: the model does not compute these images' labels: "
    )
    assert message.format(version(model.read_bytes())) in error
    assert "Traceback" not in result.stderr
    assert not csv.exists()


def test_a_name_with_brackets(
    model_file: Callable[..., Path], test_pickle: Path, tmp_path: Path
) -> None:
    model = model_file(METADATA | {"name": "[/]tiny[1]"})
    csv = tmp_path / "a.csv"
    result = submit(tmp_path, test_pickle, csv, "--model", model, SERVING_PROVIDER="cpu")
    assert result.returncode == 0
    assert f"[/]tiny[1] {version(model.read_bytes())}" in result.stderr


def test_a_pipe_is_told(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.pkl"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(submit, tmp_path, pipe, tmp_path / "a.csv")
        pipe.open("wb").close()
    assert "pipe.pkl: this is a pipe, which is read once only" in result.result().stderr


def test_a_file_that_cannot_be_written_is_told(tiny: Path, test_pickle: Path, tmp_path: Path) -> None:
    """A limit on the size of files acts like a full disk: the error does not name the file."""
    csv = tmp_path / "a.csv"
    program = f"ulimit -f 1; exec {sys.executable} -m serving submit {test_pickle} {csv}"
    result = subprocess.run(
        ["sh", "-c", program],
        cwd=ROOT,
        env=service_environment(tmp_path, SERVING_PROVIDER="cpu", SERVING_MODEL=str(tiny)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"python -m serving: error: {csv}: File too large"
    assert [path.name for path in tmp_path.iterdir() if "a.csv" in path.name] == []


def test_a_missing_model_and_an_unknown_setting(test_pickle: Path, tmp_path: Path) -> None:
    result = submit(tmp_path, test_pickle, tmp_path / "a.csv", "--model", "none.onnx")
    assert result.returncode == 1
    assert "no model file at none.onnx" in result.stderr
    result = submit(tmp_path, test_pickle, tmp_path / "a.csv", SERVING_MODLE="x")
    assert result.returncode == 1
    assert "SERVING_MODLE is not a setting" in result.stderr


def special(folder: Path) -> dict[str, Path]:
    """Paths at which no CSV can be written, by the error message."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    return {
        "pipe: not a file that can be replaced": pipe,
        "null: not a file that can be replaced": Path(os.devnull),
        "stdout: not a file that can be replaced": Path("/dev/stdout"),
        ".: not a file that can be replaced": Path(),
        "none: not a folder to write into": folder / "none" / "a.csv",
        "pipe: not a folder to write into": pipe / "a.csv",
    }


def test_where_no_file_can_be_written_is_told_before_the_work(test_pickle: Path, tmp_path: Path) -> None:
    for message, csv in special(tmp_path).items():
        result = submit(tmp_path, test_pickle, csv)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.endswith(f"{message}\n")
        assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "pipe").is_fifo()


def test_what_is_read_is_not_replaced(tiny: Path, test_pickle: Path, tmp_path: Path) -> None:
    before, link = (tiny.read_bytes(), test_pickle.read_bytes()), tmp_path / "link.csv"
    link.symlink_to(test_pickle)
    for csv in (tiny, test_pickle, link):
        result = submit(tmp_path, test_pickle, csv, SERVING_PROVIDER="cpu", SERVING_MODEL=str(tiny))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.endswith(f"{csv}: this is read; the labels need another file\n")
    assert (tiny.read_bytes(), test_pickle.read_bytes()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_others_is_told_before_the_work(test_pickle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(0o500)
    result = submit(tmp_path, test_pickle, folder / "a.csv")
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "closed: this folder cannot be written to" in result.stderr


def test_nobody_reads_the_last_line(tiny: Path, test_pickle: Path, tmp_path: Path) -> None:
    csv, (reader, writer) = tmp_path / "a.csv", os.pipe()
    os.close(reader)
    environment = service_environment(tmp_path, SERVING_PROVIDER="cpu", SERVING_MODEL=str(tiny))
    process = subprocess.run(
        [sys.executable, "-m", "serving", "submit", test_pickle, csv],
        cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, b"Error" in process.stderr) == (0, False)
    assert csv.read_text().startswith("ID,Labels\n")


def test_ctrl_c_is_told_and_nothing_written(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    csv, model, count = tmp_path / "a.csv", write_slow_model(tmp_path), 20 * len(images)
    test_pickle = tmp_path / "test.pkl"  # minutes of work, so that it is not done before a slow test
    test_pickle.write_bytes(pickled({"data": np.concatenate([images] * 20)}))
    before = {*tmp_path.iterdir()}
    settings = {"SERVING_PROVIDER": "cpu", "SERVING_MODEL": str(model), "SERVING_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "serving", "submit", test_pickle, csv],
        cwd=ROOT,
        env=service_environment(tmp_path, **settings, FORCE_COLOR="1"),  # the bar as on a terminal
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        said = b""
        while b"/%d" % count not in said:  # the progress bar shows that the work has begun
            more = os.read(process.stderr.fileno(), 65536)
            assert more, said
            said += more
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b"")
    assert rest.endswith(b"python -m serving: error: interrupted; nothing was written\n")
    assert b"Traceback" not in rest
    assert {*tmp_path.iterdir()} == before
