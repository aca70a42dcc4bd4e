"""A new model file comes while the service is under load."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from benchmarks.server import is_ready, reached
from serving.deployment import file_state, replacements
from serving.model import Model
from serving.version import version
from tests.serving.figures import read, value
from tests.serving.models import write_slow_model
from tests.serving.raw import connected, post
from tests.serving.samples import encoded, pickled
from tests.serving.server import Server, running, wait_for_workers, wait_until


@pytest.fixture
def contents(model_file: Callable[..., Path]) -> tuple[bytes, bytes]:
    """The contents of model files of two versions."""
    first, second = (model_file(name=name).read_bytes() for name in ("first.onnx", "second.onnx"))
    return first, second


def replace(file: Path, content: bytes) -> None:
    beside = file.with_name("beside")
    beside.write_bytes(content)
    beside.replace(file)


def outcomes(client: httpx.Client) -> dict[str, float]:
    samples = read(client)
    return {
        outcome: value(samples, "cifar10_model_swaps_total", outcome=outcome)
        for outcome in ("done", "refused")
    }


def test_a_new_file_takes_over_between_requests_and_a_bad_one_is_refused(
    tmp_path: Path, model_file: Callable[..., Path], images: npt.NDArray[np.uint8]
) -> None:
    paths = [model_file(scale=scale, name=f"{scale}.onnx") for scale in (1 / 255, -1 / 255)]
    models = [Model(path, "cpu", 1) for path in paths]
    first, second = (model.version for model in models)
    right = {model.version: model.logits(images[:50]).argmax(axis=1).tolist() for model in models}
    files = {model.version: path.read_bytes() for model, path in zip(models, paths, strict=True)}
    served = tmp_path / "served.onnx"
    served.write_bytes(files[first])
    assert not set(zip(right[first], range(50), strict=True)) & set(
        zip(right[second], range(50), strict=True)
    ), "the answers tell the versions apart"

    stop = threading.Event()
    seen: list[list[str]] = [[] for _ in range(4)]
    with (
        running(tmp_path, SERVING_PROVIDER="cpu", SERVING_MODEL=str(served)) as server,
        ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):

        def ask_on(number: int) -> None:
            picture = {"image": ("a.png", encoded(images[number]))}
            batch = [("images", ("a.png", encoded(image))) for image in images[:50]]
            with httpx.Client(base_url=server.url, timeout=60) as own:
                while not stop.is_set():
                    single = own.post("/classify", files=picture)
                    several = own.post("/classify_batch", files=batch)
                    assert (single.status_code, several.status_code) == (200, 200)
                    versions = {answer["model"]["version"] for answer in several.json()}
                    assert len(versions) == 1, "an answer is of one version as a whole"
                    (version,) = versions
                    top = [answer["predictions"][0]["index"] for answer in several.json()]
                    assert top == right[version]
                    version = single.json()["model"]["version"]
                    assert single.json()["predictions"][0]["index"] == right[version][number]
                    seen[number].append(version)

        def wait_for(version: str) -> None:
            """Wait until the version is served, and each load has had an answer from it."""
            while client.get("/model").json()["version"] != version or not all(
                version in versions for versions in seen
            ):
                assert not any(load.done() for load in loads)

        loads = [pool.submit(ask_on, number) for number in range(4)]
        wait_for(first)
        replace(served, files[second])
        wait_for(second)
        replace(served, files[first][:-1000])
        while outcomes(client)["refused"] == 0:
            assert not any(load.done() for load in loads)
        assert client.get("/model").json()["version"] == second
        served.unlink()
        assert client.get("/readyz").status_code == 200
        replace(served, files[first])
        wait_for(first)
        stop.set()
        for load in loads:
            load.result()
        assert [versions[0] for versions in seen] == [first] * 4
        assert outcomes(client) == {"done": 2, "refused": 1}
        shown = {
            dict(labels)["version"]: figure
            for (name, labels), figure in read(client).items()
            if name == "cifar10_model_info"
        }
        assert shown == {first: 1, second: 0}
        csv = client.post("/submission", files={"file": ("a.pkl", pickled({"data": images[:50]}))})
        assert csv.text.split() == ["ID,Labels", *(f"{i},{x}" for i, x in enumerate(right[first]))]
    log = server.log.read_text()
    assert f"tiny {second} took over from tiny {first}" in log
    assert f"tiny {second} goes on; the new model file is refused: " in log


def test_a_worker_that_starts_beside_a_bad_file_serves_the_last_good_one(
    tmp_path: Path, contents: tuple[bytes, bytes], damaged_model: bytes
) -> None:
    first, second = contents
    served = tmp_path / "served.onnx"
    served.write_bytes(first)
    with running(
        tmp_path, SERVING_PROVIDER="cpu", SERVING_THREADS="2", SERVING_MODEL=str(served)
    ) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert outcomes(client) == {"done": 0, "refused": 0}
            (worker,) = map(psutil.Process, server.workers())
            threads = worker.num_threads()
            replace(served, second)
            wait_until(lambda: outcomes(client)["done"] == 1, server)
            wait_until(lambda: worker.num_threads() <= threads + 1, server)  # it looks and loads
            replace(served, first[:-1000])
            wait_until(lambda: outcomes(client)["refused"] == 1, server)
            replace(served, damaged_model)
            wait_until(lambda: outcomes(client)["refused"] == 2, server)
        os.kill(worker.pid, signal.SIGKILL)
        wait_for_workers(server, 1, without=worker.pid)
        wait_until(lambda: reached(server.url, is_ready), server)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.get("/model").json()["version"] == version(second)
            replace(served, first)
            wait_until(lambda: client.get("/model").json()["version"] == version(first), server)
    log = server.log.read_text()
    assert "the last model file that passed serves on; the present one is refused: " in log


def test_a_newer_model_does_not_wait_for_requests_of_the_one_before(
    tmp_path: Path, contents: tuple[bytes, bytes], images: npt.NDArray[np.uint8]
) -> None:
    first, second = contents
    served = write_slow_model(tmp_path)
    file = pickled({"data": np.concatenate([images] * 10)})
    with (
        running(
            tmp_path, SERVING_PROVIDER="cpu", SERVING_THREADS="1", SERVING_MODEL=str(served)
        ) as server,
        connected(server.url) as slow,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        upload = client.build_request("POST", "/submission", files={"file": ("a.pkl", file)})
        body, kind = upload.read(), upload.headers["Content-Type"]
        slow.sendall(post("/submission", len(body), kind) + body)
        wait_until(lambda: value(read(client), "cifar10_batch_images_sum") > 0, server)
        replace(served, first)
        wait_until(lambda: serves(server, version(first)), server)
        replace(served, second)
        wait_until(lambda: serves(server, version(second)), server)
        slow.setblocking(False)
        with pytest.raises(BlockingIOError):  # it has no answer yet
            slow.recv(1)


def test_who_does_not_watch_keeps_the_model(tmp_path: Path, contents: tuple[bytes, bytes]) -> None:
    first, second = contents
    served = tmp_path / "served.onnx"
    served.write_bytes(first)
    with running(
        tmp_path, SERVING_PROVIDER="cpu", SERVING_MODEL=str(served), SERVING_WATCH_MODEL="false"
    ) as server:
        for _ in range(3):  # who watched would have taken the first of them by the end of the last
            asyncio.run(found(served, second))
        assert serves(server, version(first))
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        wait_for_workers(server, 1, without=worker)
        wait_until(lambda: reached(server.url, is_ready), server)
        assert serves(server, version(first)), "as the workers that were not replaced do"


async def found(file: Path, content: bytes) -> None:
    """Replace a file, and wait until who watches it has found the new one."""
    known = file_state(file)
    replace(file, content)
    await anext(replacements(file, lambda: known))


def serves(server: Server, version: str) -> bool:
    return bool(httpx.get(f"{server.url}/model", timeout=60).json()["version"] == version)
