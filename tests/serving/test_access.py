"""Who is let in, the ids of requests, and what is logged about them."""

import json
import re
from collections.abc import Iterator
from datetime import datetime

import httpx
import numpy as np
import pytest

from tests.serving.samples import encoded
from tests.serving.server import Server, running, wait_until
from tests.transcripts import assert_as_shown

PLAIN = "of-the-attic"  # looks the same in every encoding and escaping
KEY = f"clé {PLAIN}"
PICTURE = {"image": ("a.png", encoded(np.zeros((32, 32, 3), np.uint8)))}
WATCHED = ("/healthz", "/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
PROXY, BEHIND_IT = "127.0.0.2", "203.0.113.7"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("access")
    with running(
        folder,
        SERVING_PROVIDER="cpu",
        SERVING_API_KEY=f"{KEY}\n",
        SERVING_ACCESS_LOG="true",
        FORWARDED_ALLOW_IPS=PROXY,
    ) as server:
        yield server


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Authorization", f"Bearer {KEY}"),
        ("authorization", f"bearer  {KEY}"),
        ("X-API-Key", KEY),
    ],
)
def test_the_key_opens(server: Server, name: str, value: str) -> None:
    headers = {name.encode(): value.encode()}
    for path in ("/classify", "/v2/models/fast/infer"):
        answer = httpx.post(f"{server.url}{path}", files=PICTURE, headers=headers, timeout=60)
        assert answer.status_code != 401
    assert httpx.get(f"{server.url}/model", headers=headers, timeout=60).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"Authorization": b""},
        {b"Authorization": b"Bearer"},
        {b"Authorization": b"Bearer wrong"},
        {b"Authorization": f"Basic {KEY}".encode()},
        {b"Authorization": KEY.encode()},
        {b"X-API-Key": KEY[:-1].encode()},
        {b"X-API-Key": KEY.encode() + b"x"},
    ],
)
@pytest.mark.parametrize("path", ["/classify", "/v2/models/fast/infer", "/model", "/nothing"])
def test_nothing_else_does(server: Server, path: str, headers: dict[bytes, bytes]) -> None:
    answer = httpx.post(f"{server.url}{path}", files=PICTURE, headers=headers, timeout=60)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert PLAIN not in answer.text


@pytest.mark.parametrize("path", ["/v2", "/v2/models/fast"])
def test_under_v2_a_missing_key_has_the_protocols_error(server: Server, path: str) -> None:
    answer = httpx.get(f"{server.url}{path}", timeout=60)
    assert answer.status_code == 401
    assert answer.json()["error"].startswith("The service asks for its key")


def test_a_missing_key_is_answered_as_shown(server: Server) -> None:
    assert_as_shown("unauthorized", server.url)


@pytest.mark.parametrize("path", WATCHED)
def test_what_watches_the_service_needs_no_key(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}{path}", timeout=60).status_code == 200


def test_the_page_needs_no_key_and_says_where_one_is_needed(server: Server) -> None:
    for path in ("/", "/static_content/swagger-ui.css"):
        assert httpx.get(f"{server.url}{path}", timeout=60).status_code == 200
    document = httpx.get(f"{server.url}/docs.json", timeout=60).json()
    schemes = document["components"]["securitySchemes"]
    assert document["security"] == [{name: []} for name in schemes]
    open_paths = {
        path for path, item in document["paths"].items() if item.get("get", {}).get("security") == []
    }
    assert open_paths == {*WATCHED}
    answer = httpx.get(f"{server.url}/static_content/%2e%2e/model", timeout=60)
    assert answer.status_code == 404


def test_keys_are_not_in_the_log(server: Server) -> None:
    wrong, asked = "of-the-cellar", []
    for key, status in ((KEY, 200), (f"clé {wrong}", 401)):
        for name, value in ((b"Authorization", f"Bearer {key}"), (b"X-API-Key", key)):
            answer = httpx.get(f"{server.url}/model", headers={name: value.encode()}, timeout=60)
            assert answer.status_code == status
            asked.append(answer.headers["x-request-id"])
    # A request's line is logged after its answer.
    wait_until(lambda: all(identity in server.log.read_text() for identity in asked), server)
    log = server.log.read_text()
    assert PLAIN not in log
    assert wrong not in log


@pytest.mark.parametrize("given", ["a", "0b9f3c1e-77", "team/app:42", "x" * 128])
def test_a_sane_request_id_is_kept(client: httpx.Client, given: str) -> None:
    for path in ("/healthz", "/nothing", "/v2"):
        assert client.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a b", 'a"b', "<script>", "x" * 129, "é"])
def test_another_is_replaced(client: httpx.Client, given: str | None) -> None:
    headers = {} if given is None else {b"X-Request-Id": given.encode()}
    made = {client.post("/classify", headers=headers).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", identity) for identity in made)


@pytest.mark.parametrize("path", ["/", "/healthz", "/classify", "/nothing", "/model", "/v2/nothing"])
def test_headers_tell_little(client: httpx.Client, path: str) -> None:
    answer = client.post(path, files=PICTURE, headers={"Origin": "http://elsewhere"})
    assert answer.headers["x-content-type-options"] == "nosniff"
    told = {name for name in answer.headers if name not in ("content-length", "content-type", "allow")}
    assert told <= {"date", "x-request-id", "x-content-type-options"}


def test_the_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'self'"
    assert "script-src" not in rules


def test_a_client_s_mistake_is_no_traceback_in_the_log(server: Server) -> None:
    headers = {b"X-API-Key": KEY.encode(), b"Content-Type": b"application/vnd.bentoml+pickle"}
    for path in ("/classify", "/submission", "/nothing"):
        answer = httpx.post(f"{server.url}{path}", content=b"x", headers=headers, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "Traceback" not in server.log.read_text()


def test_each_request_is_a_line_of_json(server: Server) -> None:
    body = encoded(np.zeros((40, 30, 3), np.uint8))
    answer = httpx.post(
        f"{server.url}/classify?top_k=1",
        content=body,
        headers={
            b"X-API-Key": KEY.encode(),
            b"X-Request-Id": b"mine",
            b"Content-Type": b"image/png",
            b"X-Forwarded-For": BEHIND_IT.encode(),  # believed from the proxy only
            b"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01".encode(),
        },
        timeout=60,
    )
    assert answer.status_code == 200
    httpx.get(f"{server.url}/no%0athing%22", headers={"X-Request-Id": "yours"}, timeout=60)
    proxied = {"X-Request-Id": "proxied", "X-Forwarded-For": BEHIND_IT}
    with httpx.Client(transport=httpx.HTTPTransport(local_address=PROXY), timeout=60) as proxy:
        proxy.get(f"{server.url}/{'a' * 300}", headers=proxied)
    httpx.head(f"{server.url}/healthz", headers={"X-Request-Id": "last"}, timeout=60)
    while '"last"' not in (log := server.log.read_text()):  # it is logged after its answer
        pass
    lines = [json.loads(line) for line in log.splitlines() if line[:1] == "{"]
    found = {line["request_id"]: line for line in lines}
    mine, yours, others = found["mine"], found["yours"], found["proxied"]
    assert datetime.fromisoformat(mine.pop("time")).utcoffset() is not None
    assert mine.pop("seconds") > 0
    assert mine == {
        "request_id": "mine",
        "trace_id": TRACE,
        "client": "127.0.0.1",
        "method": "POST",
        "route": "/classify",
        "path": "/classify",
        "status": 200,
        "bytes_in": len(body),
        "bytes_out": len(answer.content),
    }
    assert found["last"]["bytes_out"] == 0
    assert (yours["route"], yours["path"], yours["status"]) == ("other", '/no\nthing"', 401)
    assert "trace_id" not in yours
    assert (others["client"], others["path"]) == (BEHIND_IT, f"/{'a' * 199}")
