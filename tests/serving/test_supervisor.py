"""What a server and its workers share: a folder of their own, and nothing with anyone else."""

import fcntl
import itertools
import os
import resource
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.mmap_dict import MmapedDict

from benchmarks.server import ServerError, family, is_ready, reached
from serving import supervisor
from serving.supervisor import LOCK, PREFIX
from tests.serving.server import Server, running, wait_for_workers, wait_until

LEFT, HELD, OTHERS = f"{PREFIX}left", f"{PREFIX}held", f"{PREFIX}data"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with its own home, and a folder for temporary files that already has others' folders."""
    folder = tmp_path_factory.mktemp("supervisor")
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    for name in (LEFT, HELD, OTHERS):
        (folder / "tmp" / name).mkdir()
    for name in (LEFT, HELD):
        lock = folder / "tmp" / name / LOCK
        lock.touch()
        os.utime(lock, (0, 0))
    with (folder / "tmp" / HELD / LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with running(
            folder,
            HOME=str(folder / "home"),
            TMPDIR=str(folder / "tmp"),
            SERVING_PROVIDER="cpu",
            BENTOML_CONTAINERIZED="true",
        ) as server:
            yield server
    assert {path.name for path in (folder / "tmp").glob("cifar10*")} == {HELD, OTHERS}


def test_it_takes_commands_from_its_user_only(server: Server) -> None:
    ports = {
        connection.laddr.port
        for process in family(server.process)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ports == {httpx.URL(server.url).port}, "but by circus' sockets"
    (folder,) = (
        path.parent
        for path in (server.log.parent / "tmp").glob(f"{PREFIX}*/{LOCK}")
        if path.parent.name != HELD
    )
    assert stat.S_ISSOCK((folder / "control").stat().st_mode)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_a_killed_server_left_is_gone_and_nothing_else(server: Server) -> None:
    names = {path.name for path in (server.log.parent / "tmp").glob(f"{PREFIX}*")}
    assert names > {HELD, OTHERS}
    assert LEFT not in names


def test_onnx_runtime_keeps_nothing_for_its_makers(server: Server) -> None:
    assert httpx.get(f"{server.url}/readyz", timeout=60).is_success
    assert not (server.log.parent / "home" / ".cache").exists()
    assert list((server.log.parent / "tmp").glob(".ses*")) == []


def test_a_dead_worker_is_replaced_in_an_image_of_bentomls_too(server: Server) -> None:
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for_workers(server, 1, without=worker)
    wait_until(lambda: reached(server.url, is_ready), server)
    assert f"worker {worker} ended by SIGKILL; another one starts" in server.log.read_text()
    assert "cifar10_killed_workers_total 1.0" in httpx.get(f"{server.url}/metrics", timeout=60).text


def test_it_is_told_that_somebody_has_removed_the_folder(server: Server) -> None:
    (folder,) = (path.parent for path in (server.log.parent / "tmp").glob(f"{PREFIX}*/control"))
    shutil.rmtree(folder)
    for path in ("/readyz", "/v2/health/ready", "/metrics"):
        answer = httpx.get(f"{server.url}{path}", timeout=60)
        assert answer.status_code == 503
        assert "The folder of the server's own files is gone; restart the service." in answer.text
    assert httpx.get(f"{server.url}/healthz", timeout=60).is_success
    assert "Traceback" not in server.log.read_text()


def test_where_no_worker_can_be_started_the_others_serve_on(tmp_path: Path) -> None:
    with running(tmp_path, SERVING_PROVIDER="cpu", SERVING_WORKERS="2") as server:
        ended, other = wait_for_workers(server, 2)
        parent = server.process.pid
        limits = resource.prlimit(parent, resource.RLIMIT_NOFILE)
        # One more file is enough to look after processes, but starting one needs a pipe.
        looks = [{int(path.name) for path in Path(f"/proc/{parent}/fd").iterdir()} for _ in range(100)]
        opened = set.intersection(*looks)  # without those that it has open for a moment only
        free = next(number for number in itertools.count() if number not in opened)
        resource.prlimit(parent, resource.RLIMIT_NOFILE, (free + 1, limits[1]))
        os.kill(ended, signal.SIGKILL)
        wait_until(lambda: "no worker can be started just now" in server.log.read_text(), server)
        assert reached(server.url, is_ready)
        assert server.workers() == {other}
        resource.prlimit(parent, resource.RLIMIT_NOFILE, limits)
        assert other in wait_for_workers(server, 2)


def test_what_ended_workers_leave_is_only_what_counts(tmp_path: Path) -> None:
    for process, requests in ((1, 0.0), (2, 3.0)):
        for kind in ("counter", "histogram", "gauge_livemax", "gauge_livemin", "gauge_livesum"):
            figures = MmapedDict(str(tmp_path / f"{kind}_{process}.db"))
            figures.write_value("a", 1.0 if kind.startswith("gauge") else requests, 0.0)
            figures.close()
        supervisor._clear(tmp_path, process)
    left = {
        path.name: [value for _, value, *_ in MmapedDict.read_all_values_from_file(str(path))]
        for path in tmp_path.iterdir()
    }
    gauges = {
        f"gauge_{kind}_{process}.db" for kind in ("livemax", "livemin", "livesum") for process in (1, 2)
    }
    assert left == {name: [] for name in gauges} | {"counter_2.db": [3.0], "histogram_2.db": [3.0]}
    assert sum(path.stat().st_size for path in tmp_path.glob("gauge*")) < 100


def test_a_path_that_is_too_long_for_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("a" * 100)
    long.mkdir()
    too_long = "is too long a path for sockets in it: set TMPDIR to one that is shorter by"
    with pytest.raises(ServerError, match=too_long), running(tmp_path, TMPDIR=str(long)):
        pytest.fail("it runs")


def test_a_full_disk_kills_no_worker(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    disk = tmp_path_factory.mktemp("disk")  # short enough for the paths of sockets
    mount = ["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        with running(tmp_path, TMPDIR=str(disk), SERVING_PROVIDER="cpu") as server:
            (worker,) = server.workers()
            with (disk / "fill").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            assert shutil.disk_usage(disk).free == 0
            for path in ("/nothing", "/model", "/v2/models/none", "/docs.json", "/metrics", "/"):
                assert httpx.get(f"{server.url}{path}", timeout=60).status_code in (200, 404)
            for path in ("/classify", "/classify_batch", "/submission", "/v2/models/none/infer"):
                assert httpx.post(f"{server.url}{path}", json={}, timeout=60).is_client_error
            assert server.workers() == {worker}

            os.kill(worker, signal.SIGKILL)
            wait_for_workers(server, 1, without=worker)
            wait_until(lambda: reached(server.url, is_ready), server)
            assert "this worker's figures are not in /metrics" in server.log.read_text()
            # A worker's temporary files are in the server's folder, whether or not the disk is full.
            (folder,) = disk.glob(f"{PREFIX}*")
            assert list(folder.glob("bentoml-client-*"))
            assert not list(disk.glob("bentoml-client-*"))
            assert httpx.get(f"{server.url}/metrics", timeout=60).status_code == 200

            # Once there is room, a worker whose figures can be read takes its place.
            (worker,) = server.workers()
            (disk / "fill").unlink()
            wait_for_workers(server, 1, without=worker)
            wait_until(lambda: reached(server.url, is_ready), server)
            figures = httpx.get(f"{server.url}/metrics", timeout=60).text
            assert "cifar10_model_info{" in figures
            assert "cifar10_killed_workers_total 1.0" in figures
    finally:
        subprocess.run(["umount", str(disk)], check=True)
