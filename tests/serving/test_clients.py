"""Clients that are slow, leave, or send too much, over raw sockets."""

import json
import re
import selectors
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.server import LOG, is_ready, running
from tests import ROOT
from tests.serving.figures import Samples, read, under_way, value
from tests.serving.models import write_slow_model
from tests.serving.raw import PATIENCE, connected, last, post
from tests.serving.samples import encoded, pickled
from tests.serving.server import serving, serving_slowly
from tests.transcripts import assert_as_shown

LAST = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def strict_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that gives clients little time; for tests of that only, which may be slow themselves."""
    folder = tmp_path_factory.mktemp("strict")
    with serving(
        folder,
        SERVING_MODEL=str(write_slow_model(folder)),
        SERVING_PROVIDER="cpu",
        SERVING_HEAD_TIMEOUT="3",
        SERVING_BODY_TIMEOUT="2",
        SERVING_REQUEST_TIMEOUT="5",
        SERVING_MAX_BODY_BYTES="7000000",
        SERVING_THREADS="1",
    ) as url:
        yield url


def images_run(samples: Samples) -> float:
    return value(samples, "cifar10_batch_images_sum")


def submission(pickle: bytes) -> bytes:
    """A whole request that posts the pickle."""
    form = httpx.Request("POST", "http://a", files={"file": ("a.pkl", pickle)})
    body = form.read()
    return post("/submission", len(body), form.headers["content-type"]) + body


def trickle(connection: socket.socket, piece: bytes) -> bytes:
    """Send the piece again and again, slowly, until the server hangs up; returns what it said."""
    said = b""
    connection.settimeout(0.1)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            connection.sendall(piece)
            received = connection.recv(65536)
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return said
        if not received:
            return said
        said += received
    raise AssertionError(f"the server holds the connection still; it said {said!r}")


@pytest.mark.parametrize(
    ("begin", "piece", "said"),
    [
        (b"", b"", b""),
        (b"", b"\r\n", b""),
        (b"POST /classify HTTP/1.1\r\n", b"X-A: b\r\n", b""),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n", b"HTTP/1.1 200 OK"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET /", b"", b"HTTP/1.1 200 OK"),
        (post("/classify", 100_000), b"x", b"HTTP/1.1 408 Request Timeout"),
        (
            post("/classify", None),
            b"1\r\nx\r\n",
            b"HTTP/1.1 408 Request Timeout",
        ),
        (
            post("/classify", 99_999_999),
            b"x",
            b"HTTP/1.1 413 ",
        ),
    ],
    ids=[
        *("nothing", "empty lines", "headers", "after an answer", "before an answer"),
        *("body", "chunks", "refused body"),
    ],
)
def test_tricklers_are_hung_up_on_and_hold_up_nobody(
    strict_url: str, images: npt.NDArray[np.uint8], begin: bytes, piece: bytes, said: bytes
) -> None:
    with ExitStack() as stack:
        others = [stack.enter_context(connected(strict_url)) for _ in range(50)]
        for other in others:
            other.sendall(begin)
        picture = {"image": ("a.png", encoded(images[0]))}
        assert httpx.post(f"{strict_url}/classify", files=picture, timeout=60).status_code == 200
        answer = trickle(others[0], piece)
        assert answer.split(b"\r\n")[0].startswith(said)
        if not said:
            assert not answer
        idle = begin.startswith(b"GET /healthz")  # idle connections may last longer
        for other in [] if idle else others[1:]:
            try:
                while other.recv(65536):
                    pass
            except ConnectionResetError:
                pass
    with httpx.Client(base_url=strict_url, timeout=60) as client:
        assert under_way(client) == 0


def test_a_slow_body_is_answered_as_shown(strict_url: str) -> None:
    assert_as_shown("slow_body", strict_url)


def test_who_asks_first_and_is_refused_is_told_that_the_connection_closes(url: str) -> None:
    """What the client sends next could be the body or another request."""
    head = post("/classify", 5000, "text/plain").removesuffix(b"\r\n") + b"Expect: 100-continue\r\n\r\n"
    with connected(url) as connection:
        connection.sendall(head)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()


def test_who_sends_on_after_a_refusal_can_read_it(url: str) -> None:
    """Repeated often enough for the server to read the body's end in pieces of all sizes."""
    body = bytes(8_000_000)
    for _ in range(50):
        with connected(url) as connection:
            connection.sendall(post("/classify", len(body)) + body)
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "head",
    [
        post("/classify", 8_000_000).replace(b"HTTP/1.1", b"HTTP/1.0"),
        last(post("/classify", 8_000_000)),
    ],
    ids=["HTTP/1.0", "Connection: close"],
)
def test_who_asks_only_once_can_read_a_refusal(url: str, head: bytes) -> None:
    """Such as urllib, and nginx by default: they send a whole body before they look for an answer."""
    for _ in range(50):
        with connected(url) as connection:
            connection.sendall(head + bytes(8_000_000))
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("refused", "rest"),
    [
        (last(post("/classify", 5, "text/plain")), b"12345" + LAST * 5),
        (post("/classify", None, "text/plain"), b"zz\r\n"),
    ],
    ids=["requests behind the last one", "body that cannot be read"],
)
def test_a_refused_request_is_answered_once(url: str, refused: bytes, rest: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(refused)
        said = connection.recv(65536)
        connection.sendall(rest)
        said += connection.makefile("rb").read()
    assert codes(answers_in(said)) == ["unsupported_media_type"]


@pytest.mark.parametrize("pieces", [1, 2, 10])
def test_trailers_are_no_headers(url: str, images: npt.NDArray[np.uint8], pieces: int) -> None:
    """A proxy looks at headers only: in trailers it would let through what it drops or sets itself."""
    content = encoded(images[0])
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(content), content)
    trailers = b"Content-Type: text/plain\r\nContent-Encoding: gzip\r\n\r\n"
    sent = (post("/classify", None) + chunks + trailers) * 2 + LAST
    assert [status for status, _ in answers_to(url, sent, pieces)] == [200] * 3


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: [::1]:3000\r\nConnection: close\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_a_request_has_one_host(url: str, head: bytes, status: int) -> None:
    assert [status for status, _ in answers_to(url, head)] == [status]


def test_a_client_of_http_1_0_is_not_asked_to_go_on(url: str, images: npt.NDArray[np.uint8]) -> None:
    """The client would take `100 Continue` for the answer."""
    content = encoded(images[0])
    head = post("/classify", len(content)).replace(b"HTTP/1.1", b"HTTP/1.0")
    sent = head.removesuffix(b"\r\n") + b"Expect: 100-continue\r\n\r\n" + content
    assert [status for status, _ in answers_to(url, sent)] == [200]


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /healthz HTTP/1.1\r\n",
        post("/classify", None) + b"1\r\nx\r\n0\r\n",
        post("/classify", None) + b"1;",
    ],
    ids=["headers", "trailers", "extensions of a chunk"],
)
def test_endless_headers_are_hung_up_on(url: str, begin: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(begin)
        endless = b"".join([b"X-A: " + b"b" * 10_000 + b"\r\n"] * 10_000)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(endless if not begin.endswith(b";") else b"b" * 100_000_000)
    assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200


def test_who_does_not_take_the_answers_is_hung_up_on(strict_url: str) -> None:
    with connected(strict_url) as connection, httpx.Client(base_url=strict_url, timeout=60) as client:
        connection.settimeout(0.01)
        deadline, hung_up = time.monotonic() + PATIENCE, False
        while not hung_up and time.monotonic() < deadline:
            try:
                connection.sendall(b"GET /docs.json HTTP/1.1\r\nHost: a\r\n\r\n" * 50)
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                hung_up = True
        assert hung_up
        assert under_way(client) == 0


def test_who_floods_with_connections_pushes_out_the_own_ones(
    tmp_path: Path, images: npt.NDArray[np.uint8]
) -> None:
    half, whole = post("/classify", 100_000), post("/classify", 0)
    begins = [b"", b"GET /", half + b"x", whole + half]
    with (
        serving_slowly(
            tmp_path,
            SERVING_MAX_WAITING="5",
            SERVING_MAX_CONNECTIONS="6",
        ) as url,
        connected(url) as asked,
        ExitStack() as stack,
    ):
        asked.sendall(submission(pickled({"data": images[:500]})))
        with httpx.Client(base_url=url, timeout=60) as client:
            # Under way is not enough: as long as its body is being read, it may be hung up on, too.
            while not value(read(client), "cifar10_queue_seconds_count"):
                pass
        flood = []
        for begin in begins * 10:
            flood.append(stack.enter_context(connected(url)))
            flood[-1].sendall(begin)
            if begin.startswith(whole):  # once this is answered, the server waits for the next request
                assert flood[-1].recv(65536)
        assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
        for connection in flood[:-6]:
            with suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
        assert asked.recv(65536).startswith(b"HTTP/1.1 200 ")
        with httpx.Client(base_url=url, timeout=60) as client:
            evicted = value(read(client), "cifar10_evicted_connections_total")
    assert len(flood) - 6 < evicted <= len(flood) + 2


FEW_FILES = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
"""


def test_where_few_files_may_be_open_fewer_requests_wait_than_there_are_connections(
    tmp_path: Path,
) -> None:
    fitting = 100
    picture = encoded(np.zeros((7000, 7000, 3), np.uint8))  # it takes long to decode
    request = post("/classify", len(picture)) + picture
    command = ("-c", FEW_FILES, "serve", "--host", "127.0.0.1", "--port", "{port}")
    settings = {"SERVING_PROVIDER": "cpu"}
    with (
        running("the service", command, settings, is_ready, tmp_path) as (url, _),
        ExitStack() as stack,
        selectors.DefaultSelector() as answered,
    ):
        for _ in range(fitting):
            connection = stack.enter_context(connected(url))
            connection.sendall(request)
            answered.register(connection, selectors.EVENT_READ, connection)
        while True:  # those that are answered before all were sent are sent again
            ((key, _), *_) = answered.select(PATIENCE)
            if key.data.recv(65536).startswith(b"HTTP/1.1 503 "):
                break
            key.data.sendall(request)
        assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    assert f"{fitting} connections at once, not 1024" in (tmp_path / LOG).read_text()


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAQ\r\n\r\n"


def offering(request: bytes) -> bytes:
    """The request with an offer to switch to another protocol."""
    head, _, body = request.partition(b"\r\n\r\n")
    return head + b"\r\n" + OFFER + body


def answers_to(url: str, sent: bytes, pieces: int = 1) -> list[tuple[int, bytes]]:
    """Status and body of each answer to what is sent, until the server closes the connection."""
    with connected(url) as connection:
        for start in range(0, len(sent), -(-len(sent) // pieces)):
            connection.sendall(sent[start : start - (-len(sent) // pieces)])
        return answers_in(connection.makefile("rb").read())


def answers_in(said: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer in what the server said."""
    found = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        (length,) = re.findall(rb"content-length: (\d+)", head.lower())
        found.append((int(head.split()[1]), said[: int(length)]))
        said = said[int(length) :]
    return found


def codes(answers: list[tuple[int, bytes]]) -> list[str]:
    """The error codes of answers, all of which must be errors."""
    return [json.loads(body)["error"]["code"] for _, body in answers]


@pytest.mark.parametrize("pieces", [1, 2, 50])
@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_a_body_with_an_offer_to_upgrade_is_no_request_of_its_own(
    url: str, chunked: bool, pieces: int
) -> None:
    smuggled = b"GET /model HTTP/1.1\r\nHost: a\r\n\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled) if chunked else smuggled
    request = offering(post("/classify", None if chunked else len(smuggled)) + body)
    answers = answers_to(url, request + LAST, pieces)
    assert [status for status, _ in answers] == [400, 200]
    assert b"not a PNG" in answers[0][1]


def test_what_comes_behind_offers_to_upgrade_is_answered(
    url: str, images: npt.NDArray[np.uint8]
) -> None:
    get = b"GET /model HTTP/1.1\r\nHost: a\r\n\r\n"
    content = encoded(images[0])
    picture = post("/classify", len(content)) + content
    sent = offering(get) * 40 + offering(picture) + get + picture + offering(get) + LAST
    answers = answers_to(url, sent)
    assert [status for status, _ in answers] == [200] * 45
    model = answers[0][1]
    assert [body == model for _, body in answers] == [True] * 40 + [False, True, False, True, False]
    assert answers[40] == answers[42]


@pytest.mark.parametrize(
    "request_",
    [
        post("/classify", None) + b"zz\r\n",
        post("/classify", None) + b"1\r\nxyz\r\n",
        post("/classify", None).replace(b"chunked", b"identity") + b"x",
        post("/classify", 1).replace(b"h: 1", b"h: one") + b"x",
    ],
    ids=["size of a chunk", "end of a chunk", "encoding", "length"],
)
def test_a_body_that_is_framed_wrongly_is_answered(url: str, request_: bytes) -> None:
    assert codes(answers_to(url, request_)) == ["bad_request"]


@pytest.mark.parametrize("unreadable", [b"HELLO\r\n\r\n", post("/classify", None) + b"zz\r\n"])
def test_whole_requests_are_answered_before_what_cannot_be_read_ends_the_connection(
    url: str, images: npt.NDArray[np.uint8], unreadable: bytes
) -> None:
    content = encoded(images[0])
    picture = post("/classify", len(content)) + content
    for whole in (LAST.replace(b"close", b"keep-alive"), picture, picture * 3):
        answers = answers_to(url, whole + unreadable)
        assert [status for status, _ in answers] == [200] * max(1, whole.count(picture))


@pytest.mark.parametrize("request_line", [b"CONNECT a:80 HTTP/1.1", b"CONNECT /model HTTP/1.1"])
def test_what_comes_behind_connect_is_not_read(url: str, request_line: bytes) -> None:
    get = b"GET /model HTTP/1.1\r\nHost: a\r\n\r\n"
    head = request_line + b"\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(get)
    assert codes(answers_to(url, head + get)) == ["bad_request"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_curl_that_offers_http_2(url: str) -> None:
    form = ["-F", f"image=@{ROOT / 'docs' / 'cat.png'}", f"{url}/classify"]
    said = subprocess.run(["curl", "--silent", "--http2", *form], check=True, capture_output=True).stdout
    assert json.loads(said)["predictions"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /model HTTP/1.0\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET /model HTTP/1.1\r\nHost: a\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ],
)
def test_an_offer_on_a_connection_that_will_close_is_ignored(url: str, head: bytes) -> None:
    ((status, body),) = answers_to(url, head)
    assert status == 200
    assert json.loads(body)["contract"] == 1


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_other_offers_to_upgrade_are_ignored(url: str, protocol: str) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": protocol, "Sec-WebSocket-Key": "a", "A": "b"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        assert [client.get("/healthz").status_code for _ in range(3)] == [200] * 3


def test_what_is_not_http_is_told_in_our_shape(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"HELLO\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"\r\ndate: " in head
    message = "The request is not HTTP that can be read."
    assert json.loads(body) == {"error": {"code": "bad_request", "message": message}}


def test_large_headers_within_the_limit_pass(url: str) -> None:
    headers = {f"X-{i}": "a" * 5000 for i in range(10)}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        assert [client.get("/healthz").status_code for _ in range(3)] == [200] * 3


def test_headers_beyond_the_limit_do_not_pass_even_in_one_piece(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 66_000 + b"\r\n\r\n")
        said = connection.makefile("rb").read()
    assert said.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("leaves", [True, False], ids=["client leaves", "timeout"])
def test_work_that_nobody_waits_for_is_dropped(
    strict_url: str, images: npt.NDArray[np.uint8], leaves: bool
) -> None:
    rows = 2000  # more than the engine can run before the timeout
    content = pickled({"data": np.concatenate([images] * (rows // len(images)))})
    with httpx.Client(base_url=strict_url, timeout=60) as client:
        before = read(client)
        if leaves:
            with connected(strict_url) as connection:
                connection.sendall(submission(content))
                while images_run(read(client)) == images_run(before):
                    pass
        else:
            answer = client.post("/submission", files={"file": ("a.pkl", content)})
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "timeout"
        while under_way(client):
            pass
        after = read(client)

        def more(name: str, **labels: str) -> float:
            return value(after, name, **labels) - value(before, name, **labels)

        assert (
            more("cifar10_requests_total", route="/submission", status="499" if leaves else "504") == 1
        )
        assert images_run(after) - images_run(before) < rows
        picture = {"image": ("a.png", encoded(images[0]))}
        assert client.post("/classify", files=picture).status_code == 200
