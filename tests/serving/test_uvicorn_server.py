"""uvicorn as it is used here: what is relied on beyond its documentation."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.uvicorn_server import shorten


def application(name: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(f"{name} for {scope['client'][0]}")(scope, receive, send)

    return app


class Server(uvicorn.Server):
    """Tells when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def running(proxy_headers: bool) -> Iterator[str]:
    config = uvicorn.Config(
        application("long"), port=0, lifespan="off", log_level="error", proxy_headers=proxy_headers
    )
    config.load()
    server = Server(config)
    shorten(server, {"/short"}, application("short"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.ready.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(("proxy_headers", "client"), [(True, "203.0.113.7"), (False, "127.0.0.1")])
def test_posts_to_short_paths_go_past_the_servers_application(proxy_headers: bool, client: str) -> None:
    headers = {"X-Forwarded-For": "203.0.113.7"}
    with running(proxy_headers) as url:
        assert httpx.post(f"{url}/short", headers=headers).text == f"short for {client}"
        assert httpx.get(f"{url}/short", headers=headers).text == f"long for {client}"
        assert httpx.post(f"{url}/other", headers=headers).text == f"long for {client}"


@pytest.mark.parametrize(
    ("hard", "fitting", "soft"), [(10_000, 1000, 2024), (1500, 750, 1500), (2000, 1000, 2000)]
)
def test_open_files_bound_the_connections(hard: int, fitting: int, soft: int) -> None:
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
from serving.uvicorn_server import connections_that_fit
print(connections_that_fit(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(fitting), str(soft)]
    assert ("ulimit" in run.stderr) == (fitting < 1000)
