import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cifar10 import CIFAR10, needs_cifar10
from tests.listener import listening, refusing
from training import data
from training.files import locked
from training.model import CLASSES


def test_sample_has_real_images_of_all_classes() -> None:
    sample = data.load_sample()
    assert (len(sample.train), len(sample.test), sample.source) == (500, 1000, "sample")
    assert sample.test.pixels.shape == (1000, 32, 32, 3)
    assert sample.test.pixels.dtype == torch.uint8
    assert set(sample.train.labels.tolist()) == set(sample.test.labels.tolist()) == set(range(10))


def test_another_file_than_the_bundled_sample_is_another_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy, other = tmp_path / "copy.npz", tmp_path / "other.npz"
    shutil.copy(data.SAMPLE, copy)
    arrays = dict(np.load(data.SAMPLE, allow_pickle=False))
    np.savez(other, **arrays | {"train_images": arrays["train_images"][::-1]}, allow_pickle=False)
    sources = []
    for path in (copy, other):
        monkeypatch.setenv(data.ROOT_VARIABLE, str(path))
        sources.append(data.load().source)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    assert sources == ["sample", f"sample-{digest[:12]}"]


@needs_cifar10
def test_sample_is_the_beginning_of_the_data_set() -> None:
    sample, whole = data.load_sample(), data.load()
    assert (len(whole.train), len(whole.test), whole.source) == (50000, 10000, "cifar10")
    for part, all_images in ((sample.train, whole.train), (sample.test, whole.test)):
        assert torch.equal(part.pixels, all_images.pixels[: len(part)])
        assert torch.equal(part.labels, all_images.labels[: len(part)])


@needs_cifar10
def test_the_data_set_in_the_cache_folder_is_present(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(data.ROOT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.load_present().source == "sample"
    folder = tmp_path / "cifar10"
    folder.mkdir()
    (folder / data.FOLDER).symlink_to(Path(CIFAR10) / data.FOLDER)
    assert data.load_present().source == "cifar10"


def test_split_parts_the_images() -> None:
    train = data.load_sample().train
    rest, val = data.split(train, 0.2)
    assert (len(rest), len(val)) == (400, 100)
    seen = {image.numpy().tobytes() for image in torch.cat([rest.pixels, val.pixels])}
    assert seen == {image.numpy().tobytes() for image in train.pixels}
    again = data.split(train, 0.2)[1]
    assert torch.equal(again.pixels, val.pixels)
    assert [len(data.split(train, share)[1]) for share in (0.0, 0.0009, 0.0011)] == [0, 0, 1]


def test_missing_data_set_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(data.DataError, match=r"is not there.*CIFAR10_ROOT.*unset it to download"):
        data.load()


@needs_cifar10
def test_damaged_data_set_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(Path(CIFAR10) / data.FOLDER, tmp_path / data.FOLDER)
    batch = tmp_path / data.FOLDER / "data_batch_3"
    batch.chmod(0o644)
    with batch.open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\0\0\0")
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(data.DataError, match="damaged"):
        data.load()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that fails to be read")
def test_data_set_that_cannot_be_read_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / data.FOLDER).mkdir()
    (tmp_path / data.FOLDER / "data_batch_1").symlink_to("/proc/self/mem")  # an error even for root
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(data.DataError, match=r"could not read CIFAR-10 in .*Input/output error"):
        data.load()


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A real attempt, through a proxy that refuses every connection.
    monkeypatch.delenv(data.ROOT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "")
    with refusing() as address:
        monkeypatch.setenv("https_proxy", address)
        with pytest.raises(data.DataError, match=r"nor download it there.*CIFAR10_ROOT"):
            data.load()


# Makes torchvision take a data set of the sample's images for the official one.
OTHERWISE = """
import json, sys
from pathlib import Path
from torchvision.datasets import CIFAR10
from training import data

url, *sums = json.loads(Path(sys.argv[1]).read_text())
CIFAR10.url, CIFAR10.tgz_md5, CIFAR10.meta["md5"], *files = url, *sums
for kept, md5 in zip(CIFAR10.train_list + CIFAR10.test_list, files, strict=True):
    kept[1] = md5
found = data.load()
print(len(found.train), len(found.test), found.test.pixels.sum().item())
"""


def write_archive(folder: Path) -> list[str]:
    """Write an archive of the sample; returns the MD5 sums of it, of its metadata and of its batches."""
    sample = data.load_sample()
    batches = folder / data.FOLDER
    batches.mkdir()
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    parts = [(f"data_batch_{i + 1}", sample.train, slice(100 * i, 100 * i + 100)) for i in range(5)]
    parts.append(("test_batch", sample.test, slice(None)))
    for name, images, rows in parts:
        planes = images.pixels[rows].permute(0, 3, 1, 2).reshape(-1, 3072).numpy()
        content = {"data": planes, "labels": images.labels[rows].tolist()}
        (batches / name).write_bytes(pickle.dumps(content))
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(batches, data.FOLDER)
    files = [archive, batches / "batches.meta", *(batches / name for name, _, _ in parts)]
    return [hashlib.md5(path.read_bytes()).hexdigest() for path in files]


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="who waits for a file is not shown here")
def test_one_process_downloads_while_others_wait(tmp_path: Path) -> None:
    cache, served = tmp_path / "cache" / "cifar10", tmp_path / "served"
    cache.mkdir(parents=True)
    served.mkdir()
    sums = write_archive(served)
    fetched: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form: str, *values: object) -> None:
            fetched.append(self.path)

    def waiting() -> set[int]:
        """The ids of the processes that wait for a file that another one has locked."""
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return {int(row[5]) for row in rows if row[1] == "->"}

    environment = {name: value for name, value in os.environ.items() if name != data.ROOT_VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(cache.parent), "no_proxy": "*"}
    facts = tmp_path / "facts.json"
    with listening(partial(Handler, directory=served)) as address:
        facts.write_text(json.dumps([f"{address}/cifar-10-python.tar.gz", *sums]))
        with locked(cache / ".lock"):
            processes = [
                subprocess.Popen(
                    [sys.executable, "-c", OTHERWISE, str(facts)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for _ in range(2)
            ]
            while not waiting() >= {process.pid for process in processes}:
                assert [process.poll() for process in processes] == [None, None]
            assert fetched == []
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert 1 <= len(fetched) <= 2  # torchvision may ask once more, to follow redirects
    total = data.load_sample().test.pixels.sum().item()
    assert [output.splitlines()[-1] for output in outputs] == [f"500 1000 {total}"] * 2


def test_a_damaged_download_says_what_to_do(tmp_path: Path) -> None:
    sums = write_archive(tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-1000])  # as a broken connection or a proxy leaves it
    facts = tmp_path / "facts.json"
    environment = {name: value for name, value in os.environ.items() if name != data.ROOT_VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "no_proxy": "*"}
    with listening(partial(SimpleHTTPRequestHandler, directory=tmp_path)) as address:
        facts.write_text(json.dumps([f"{address}/{archive.name}", *sums]))
        command = [sys.executable, "-c", OTHERWISE, str(facts)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "DataError: could neither read CIFAR-10 in" in done.stderr
    assert "unpack it, and set CIFAR10_ROOT to the folder" in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        *("not a file of arrays", "shape", "labels", "truncated", "flipped", "empty", "one array"),
        *("no image", "fewer labels", "labels of a byte", "fractions"),
        *("encrypted", "compressed by LZMA"),
    ],
)
def test_wrong_sample_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "sample.npz"
    arrays = dict(np.load(data.SAMPLE, allow_pickle=False))
    if damage == "shape":
        arrays["test_images"] = arrays["test_images"].reshape(1000, -1)
    elif damage == "no image":
        arrays |= {name: arrays[name][:0] for name in ("test_images", "test_labels")}
    elif damage == "labels":
        arrays["train_labels"] = arrays["train_labels"] + 1
    elif damage == "labels of a byte":
        arrays["train_labels"] = arrays["train_labels"].astype(np.uint8)
    elif damage == "fractions":
        arrays["test_images"] = arrays["test_images"] / 255
    elif damage == "fewer labels":
        arrays["train_labels"] = arrays["train_labels"][:-1]
    np.savez(path, **arrays)
    if damage == "not a file of arrays":
        path.write_bytes(b"not a file of arrays")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage in ("encrypted", "compressed by LZMA"):  # as the archive's directory claims
        content = bytearray(path.read_bytes())
        entry = content.index(b"PK\x01\x02")
        content[entry + 8], content[entry + 10] = (1, 0) if damage == "encrypted" else (0, 14)
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "one array":
        with path.open("wb") as file:
            np.save(file, arrays["test_images"])
    monkeypatch.setenv(data.ROOT_VARIABLE, str(path))
    reason = r".*: train_labels is not int64 \[500\] in 0\.\.9" if "labels" in damage else ""
    with pytest.raises(data.DataError, match=f"not a sample of CIFAR-10{reason}"):
        data.load()
