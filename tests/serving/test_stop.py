"""A service that is stopped, or loses a worker, under load."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil

from benchmarks.server import is_ready, reached
from tests.serving.figures import under_way
from tests.serving.models import write_slow_model
from tests.serving.raw import connected, post
from tests.serving.samples import encoded, pickled
from tests.serving.server import START_SECONDS, Server, running, wait_for_workers, wait_until
from tests.transcripts import assert_as_shown


def test_a_stop_answers_what_was_accepted_and_refuses_the_rest(
    tmp_path: Path, images: npt.NDArray[np.uint8]
) -> None:
    content = encoded(images[0])
    picture = {"image": ("a.png", content)}
    bulk = {"file": ("a.pkl", pickled({"data": images[:300]}))}
    signalled = threading.Event()
    outcomes: list[tuple[bool, httpx.Response]] = []  # whether it was sent before the signal; the answer

    with (
        running(
            tmp_path,
            SERVING_MODEL=str(write_slow_model(tmp_path)),
            SERVING_PROVIDER="cpu",
            SERVING_STOP_TIMEOUT="120",
        ) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
        ThreadPoolExecutor(6) as pool,
        connected(server.url) as slow,
    ):

        def ask_on() -> None:
            before = False

            def note(event: str, details: Mapping[str, Any]) -> None:
                # Only what has been sent as a whole is on its way, however slow this thread is.
                nonlocal before
                if event == "http11.send_request_body.complete":
                    before = not signalled.is_set()

            with httpx.Client(base_url=server.url, timeout=120) as own:
                while True:
                    answer = own.post("/classify", files=picture, extensions={"trace": note})
                    outcomes.append((before, answer))
                    if answer.status_code != 200:
                        return

        slow.sendall(post("/classify", len(content)) + content[:100])
        loads = [pool.submit(ask_on) for _ in range(4)]
        submissions = [
            pool.submit(httpx.post, f"{server.url}/submission", files=bulk, timeout=120)
            for _ in range(2)
        ]
        while under_way(client) < 7:
            assert not any(job.done() for job in submissions + loads)
        signalled.set()
        server.process.send_signal(signal.SIGTERM)
        for load in loads:
            load.result()
        unready = httpx.get(f"{server.url}/readyz", timeout=60)
        alive = httpx.get(f"{server.url}/healthz", timeout=60)
        refused = httpx.post(f"{server.url}/classify", files=picture, timeout=60)
        assert_as_shown("stopping", server.url)
        answers = [job.result() for job in submissions]
        slow.sendall(content[100:])
        last = slow.makefile("rb").read()
        assert server.process.wait(START_SECONDS) == 0

    assert unready.status_code == 503
    assert unready.json()["error"] == {"code": "not_ready", "message": "The service is stopping."}
    assert alive.status_code == 200
    for answer in (refused, *(answer for _, answer in outcomes if answer.status_code != 200)):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "stopping"
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
    assert {answer.status_code for before, answer in outcomes if before} == {200}
    for answer in answers:
        assert answer.status_code == 200
        assert len(answer.text.splitlines()) == 301
    assert last.startswith(b"HTTP/1.1 200 ")
    assert b'"predictions"' in last


def test_a_stop_does_not_wait_for_ever(tmp_path: Path) -> None:
    with running(tmp_path, SERVING_PROVIDER="cpu", SERVING_STOP_TIMEOUT="0.5") as server:
        with connected(server.url) as slow, httpx.Client(base_url=server.url, timeout=60) as client:
            slow.sendall(post("/classify", 100) + b"beginning")
            while under_way(client) < 1:
                pass
            server.process.send_signal(signal.SIGTERM)
            answer = slow.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"stopping"' in answer
        assert server.process.wait(START_SECONDS) == 0


def test_a_stop_does_not_wait_for_a_worker_that_is_stuck(tmp_path: Path) -> None:
    with running(tmp_path, SERVING_PROVIDER="cpu", SERVING_STOP_TIMEOUT="0.5") as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(START_SECONDS) == 0
        assert f"worker {worker} did not end in time, and was killed" in server.log.read_text()


def test_workers_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    with running(tmp_path, SERVING_PROVIDER="cpu", exit_code=-signal.SIGKILL) as server:
        (worker,) = map(psutil.Process, server.workers())
        server.process.kill()
        _, alive = psutil.wait_procs([worker], START_SECONDS)
        for left in alive:
            left.kill()
        assert alive == []


def test_a_worker_that_is_not_up_yet_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    began = running(tmp_path, exit_code=-signal.SIGKILL, until=lambda url: True, SERVING_PROVIDER="cpu")
    with began as server:
        (worker,) = map(psutil.Process, wait_for_workers(server, 1))
        server.process.kill()
        _, alive = psutil.wait_procs([worker], START_SECONDS)
        for left in alive:
            left.kill()
        assert alive == []


def test_ctrl_c_again_ends_what_waits(tmp_path: Path) -> None:
    with (
        running(tmp_path, SERVING_PROVIDER="cpu", SERVING_STOP_TIMEOUT="600") as server,
        connected(server.url) as slow,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        slow.sendall(post("/classify", 100) + b"beginning")
        while under_way(client) < 1:
            pass
        server.process.send_signal(signal.SIGINT)  # a terminal does not reach the workers
        while client.get("/model").status_code == 200:
            pass
        assert client.get("/model").json()["error"]["code"] == "stopping"
        server.process.send_signal(signal.SIGINT)
        answer = slow.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"stopping"' in answer
        assert server.process.wait(START_SECONDS) == 0


def test_a_killed_worker_is_replaced_and_the_other_loses_nothing(
    tmp_path: Path, images: npt.NDArray[np.uint8]
) -> None:
    picture = {"image": ("a.png", encoded(images[0]))}
    with (
        running(tmp_path, SERVING_PROVIDER="auto", SERVING_WORKERS="2", SERVING_THREADS="1") as server,
        ThreadPoolExecutor(4) as pool,
        connected(server.url) as slow,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        slow.sendall(post("/classify", 100) + b"beginning")
        while under_way(client) < 1:
            pass
        killed = _worker(server, slow.getsockname()[1])
        clients = _clients_of_each_worker(server, 2)
        lost = clients.pop(killed)
        ((kept, spared),) = clients.items()
        stop = threading.Event()

        def ask_on(client: httpx.Client) -> list[int]:
            statuses = []
            while not stop.is_set():
                statuses.append(client.post("/classify", files=picture).status_code)
            return statuses

        loads = [pool.submit(ask_on, client) for client in spared]
        doomed = [pool.submit(ask_on, client) for client in lost]
        os.kill(killed, signal.SIGKILL)
        workers = wait_for_workers(server, 2, without=killed)
        assert kept in workers
        (replacement,) = workers - {kept}
        found = _clients_of_each_worker(server, 1)
        assert found[replacement][0].post("/classify", files=picture).status_code == 200
        stop.set()
        for load in loads:
            statuses = load.result()
            assert set(statuses) == {200}
        for load in doomed:  # a client either sees its broken connection as an error or reconnects
            assert load.exception() is None or isinstance(load.exception(), httpx.TransportError)
        assert under_way(spared[0]) == 0, "without the request that has died with its worker"
        metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
        for own in [*lost, *spared, *(own for some in found.values() for own in some)]:
            own.close()
    assert "cifar10_model_info{" in metrics
    # The figures in the reason tell that only the first worker has measured.
    chosen = re.findall(r"accurate [0-9a-f]{12} on (.+)", server.log.read_text())
    assert len(chosen) == 3
    assert len(set(chosen)) == 1, chosen


def test_a_hangup_starts_the_workers_anew(tmp_path: Path) -> None:
    with _starting_anew(tmp_path) as (server, old, _):
        wait_until(lambda: reached(server.url, is_ready), server)
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(old), server)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert under_way(client) == 0, "without the request that has died with its worker"
        (idle,) = server.workers()
        server.process.send_signal(signal.SIGHUP)
        wait_for_workers(server, 1, without=idle)
        wait_until(lambda: not psutil.pid_exists(idle), server)
        wait_until(lambda: reached(server.url, is_ready), server)
        metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
        assert "cifar10_killed_workers_total 1.0" in metrics, "without the one that ended by itself"


def test_a_hangup_while_workers_start_anew_is_heeded(tmp_path: Path) -> None:
    with _starting_anew(tmp_path) as (server, old, slow):
        (new,) = server.workers() - {old}
        server.process.send_signal(signal.SIGHUP)
        slow.close()  # which is what the old worker, and so the supervisor, waits for
        wait_until(lambda: not psutil.pid_exists(old), server)
        wait_for_workers(server, 1, without=new)


def test_a_stop_while_workers_start_anew_is_heeded(tmp_path: Path) -> None:
    with _starting_anew(tmp_path) as (server, old, slow):
        server.process.send_signal(signal.SIGTERM)
        assert psutil.pid_exists(old)
        slow.close()  # which is what the old worker, and so the supervisor, waits for
        assert server.process.wait(START_SECONDS) == 0
        assert "another one starts" not in server.log.read_text()


@contextmanager
def _starting_anew(folder: Path) -> Iterator[tuple[Server, int, socket.socket]]:
    """A server after SIGHUP, with a new worker; the old one, which waits for a request; its client."""
    with (
        running(
            folder,
            SERVING_PROVIDER="cpu",
            SERVING_STOP_TIMEOUT="600",
            SERVING_BODY_TIMEOUT="600",
        ) as server,
        connected(server.url) as slow,
    ):
        (old,) = server.workers()
        slow.sendall(post("/classify", 100) + b"beginning")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while under_way(client) < 1:
                pass
        server.process.send_signal(signal.SIGHUP)
        wait_for_workers(server, 1, without=old)
        yield server, old, slow


def _clients_of_each_worker(server: Server, count: int) -> dict[int, list[httpx.Client]]:
    """Clients with open connections to each of two workers, by the worker's process id."""
    clients: dict[int, list[httpx.Client]] = {}
    deadline = time.monotonic() + START_SECONDS
    while len(clients) < 2 or any(len(some) < count for some in clients.values()):
        assert time.monotonic() < deadline, "both workers get connections"
        client = httpx.Client(base_url=server.url, timeout=60)
        response = client.get("/healthz")
        port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
        owner = _worker(server, port)
        if len(clients.setdefault(owner, [])) < count:
            clients[owner].append(client)
        else:
            client.close()
    return clients


def _worker(server: Server, port: int) -> int:
    """The process id of the worker that holds the connection from a client's port."""
    (owner,) = {
        worker
        for worker in server.workers()
        for connection in psutil.Process(worker).net_connections("tcp")
        if connection.raddr and connection.raddr.port == port
    }
    return owner
