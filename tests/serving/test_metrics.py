"""What Prometheus reads from a real service, the dashboard that shows it, and the alerts."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from serving.model import Model
from serving.predictions import softmax
from tests import ROOT
from tests.serving.figures import read, value
from tests.serving.models import CLASSES
from tests.serving.raw import connected, post
from tests.serving.samples import encoded, pickled
from tests.serving.server import running, serving_slowly
from tests.transcripts import assert_as_shown

DASHBOARD = json.loads((ROOT / "serving" / "grafana.json").read_text())
ALERTS = ROOT / "serving" / "alerts.yml"


def test_a_flood_of_reports_is_refused_but_sheds_no_request(url: str, client: httpx.Client) -> None:
    before = value(read(client), "cifar10_shed_requests_total", lacking="queue")
    answers: set[bytes] = set()
    while b"HTTP/1.1 503 Service Unavailable" not in answers:  # what a slow test sends may be no flood
        with ExitStack() as stack:
            askers = [stack.enter_context(connected(url)) for _ in range(100)]
            for asker in askers:
                asker.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            answers |= {asker.recv(65536).partition(b"\r\n")[0] for asker in askers}
    assert answers == {b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable"}
    assert value(read(client), "cifar10_shed_requests_total", lacking="queue") == before


def test_requests_images_and_runs_are_counted(
    client: httpx.Client, model: Model, images: npt.NDArray[np.uint8]
) -> None:
    before = read(client)
    for image in images[:5]:
        client.post("/classify", files={"image": ("a.png", encoded(image))})
    client.post("/classify", files={"image": ("a.png", b"none")})
    client.post("/submission", files={"file": ("a.pkl", pickled({"data": images[:200]}))})
    client.post(f"/v2/models/{model.name}/infer")
    after = read(client)

    def more(name: str, /, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert more("cifar10_requests_total", route="/classify", status="200") == 5
    assert more("cifar10_requests_total", route="/classify", status="400") == 1
    assert more("cifar10_requests_total", route="/submission", status="200") == 1
    assert more("cifar10_requests_total", route="/v2/infer", status="400") == 1
    assert more("cifar10_request_seconds_count", route="/classify") == 6
    assert more("cifar10_request_seconds_sum", route="/classify") > 0
    assert more("cifar10_batch_images_sum") == 205
    runs = more("cifar10_batch_images_count")
    assert 6 <= runs == more("cifar10_engine_seconds_count")
    assert more("cifar10_queue_seconds_count") >= runs
    assert more("cifar10_confidence_count") == 205
    probabilities = softmax(model.logits(np.concatenate([images[:5], images[:200]])))
    assert more("cifar10_confidence_sum") == pytest.approx(probabilities.max(axis=1).sum(), rel=1e-3)
    predicted = np.bincount(probabilities.argmax(axis=1), minlength=10).tolist()
    counted = [more("cifar10_predictions_total", label=label) for label in model.classes]
    assert counted == predicted
    shown = {"name": model.name, "version": model.version, "provider": model.provider}
    assert value(after, "cifar10_model_info", **shown) == 1


def test_unknown_paths_are_one_series(client: httpx.Client) -> None:
    for number in range(20):
        client.get(f"/wp-admin/{number}.php")
        client.get(f"/v2/models/{number}")
    routes = {dict(labels).get("route") for _, labels in read(client)} - {None}
    assert {"other", "/v2"} <= routes
    assert len(routes) < 15
    # BentoML's own series would have the path as a label.
    assert "wp-admin" not in client.get("/metrics").text


@pytest.fixture(scope="module")
def narrow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service in which one request waits at a time."""
    with serving_slowly(tmp_path_factory.mktemp("narrow"), SERVING_MAX_WAITING="1") as url:
        yield url


def test_full_service_says_so_and_counts_whom_it_refuses(
    narrow_url: str, images: npt.NDArray[np.uint8]
) -> None:
    picture = {"image": ("a.png", encoded(images[0]))}
    bulk = {
        "file": ("a.pkl", pickled({"data": images}))
    }  # takes far longer than all that comes meanwhile
    with httpx.Client(base_url=narrow_url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        before = read(client)
        assert client.get("/v2/health/ready").status_code == 200
        submission = pool.submit(httpx.post, f"{narrow_url}/submission", files=bulk, timeout=60)
        while client.get("/v2/health/ready").status_code == 200:
            assert not submission.done()
        answer = client.post("/classify", files=picture)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        with connected(narrow_url) as begun:  # the body never comes
            begun.sendall(post("/classify", 100_000))
            assert begun.recv(65536).startswith(b"HTTP/1.1 503 ")
        assert_as_shown("overloaded", narrow_url)
        assert_as_shown("not_ready", narrow_url)
        assert client.get("/readyz").headers["retry-after"] == "1"
        assert submission.result().status_code == 200
        assert client.get("/v2/health/ready").status_code == 200
        after = read(client)

    def more(name: str, /, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert more("cifar10_requests_total", route="/classify", status="503") == 3
    assert more("cifar10_shed_requests_total", lacking="queue") == 3


def test_a_worker_reports_that_it_is_at_work(client: httpx.Client) -> None:
    begun = value(read(client), "cifar10_heartbeat_timestamp_seconds")
    deadline = time.monotonic() + 60
    while value(read(client), "cifar10_heartbeat_timestamp_seconds") <= begun:
        assert time.monotonic() < deadline


def test_requests_of_each_kind_count_as_waiting(narrow_url: str, images: npt.NDArray[np.uint8]) -> None:
    tensor = {"name": "images", "shape": [20, *images.shape[1:]], "datatype": "UINT8"}
    kinds: dict[str, dict[str, Any]] = {
        "/classify": {"files": {"image": encoded(images[0])}},
        "/classify_batch": {"files": [("images", encoded(image)) for image in images[:20]]},
        "/v2/models/tiny/infer": {"json": {"inputs": [{**tensor, "data": images[:20].tolist()}]}},
        "/submission": {"files": {"file": pickled({"data": images[:20]})}},
    }

    with httpx.Client(base_url=narrow_url, timeout=60) as client, ThreadPoolExecutor(8) as pool:

        def ask(path: str) -> int:
            return client.post(path, **kinds[path]).status_code

        for path in kinds:
            found: set[int] = set()
            while found != {200, 503}:  # what a slow test sends may not meet
                found |= set(pool.map(ask, [path] * 24))
                assert found <= {200, 503}, path


def test_dashboard_shows_only_what_there_is(client: httpx.Client) -> None:
    samples = read(client)
    names = {name for name, _ in samples}
    labels = {label for _, pairs in samples for label, _ in pairs}
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"cifar10_\w+", text)}
    assert used <= names
    assert {name.removesuffix("_total") for name in names if name.endswith("_total")} == {
        name.removesuffix("_total") for name in used if name.endswith("_total")
    }, "each counter is shown"
    grouped = {
        label.strip()
        for text in expressions
        for part in re.findall(r"by \(([^)]*)\)", text)
        for label in part.split(",")
    }
    assert grouped <= labels
    legends = [target["legendFormat"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert {label for text in legends for label in re.findall(r"{{(\w+)}}", text)} <= labels


def test_alerts_look_only_at_what_there_is(client: httpx.Client) -> None:
    samples = read(client)
    selected = re.findall(r"(cifar10_\w+)(?:{([^}]*)})?", ALERTS.read_text())
    assert {name for name, _ in selected} <= {name for name, _ in samples}
    for name, matchers in selected:
        labels = {label for found, pairs in samples if found == name for label, _ in pairs}
        assert set(re.findall(r"(\w+)[!=]", matchers)) <= labels


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus' promtool")
def test_alerts_are_raised_by_what_they_are_for() -> None:
    for verb, file in (("check", ALERTS), ("test", Path(__file__).with_name("alerts.yml"))):
        command = ["promtool", verb, "rules", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_figures_begin_at_0_and_a_second_server_leaves_those_of_the_first_alone(
    tmp_path: Path, model_file: Callable[..., Path]
) -> None:
    """Both servers are of the same user, so they share one BENTOML_HOME."""
    model = str(model_file())

    def answered(url: str) -> float:
        with httpx.Client(base_url=url, timeout=60) as client:
            client.get("/model")
            return value(read(client), "cifar10_requests_total", route="/model", status="200")

    with running(tmp_path, SERVING_MODEL=model, SERVING_PROVIDER="cpu") as first:
        with httpx.Client(base_url=first.url, timeout=60) as client:
            begun = read(client)
        for label in CLASSES:
            assert begun["cifar10_predictions_total", frozenset({("label", label)})] == 0
        for status in ("200", "500", "503", "504"):
            labels = frozenset({("route", "/classify"), ("status", status)})
            assert begun["cifar10_requests_total", labels] == 0
        assert answered(first.url) == 1
        with running(tmp_path, SERVING_MODEL=model, SERVING_PROVIDER="cpu") as second:
            assert answered(second.url) == 1
        assert answered(first.url) == 2
