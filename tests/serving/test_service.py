"""The service over HTTP: a real process, real images, the bundled model."""

import asyncio
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from select import select
from typing import Any

import bentoml
import httpx
import numpy as np
import numpy.typing as npt
import pytest

from serving.model import Model
from serving.predictions import top_predictions
from tests import ROOT
from tests.listener import listening
from tests.serving.figures import under_way
from tests.serving.models import CLASSES
from tests.serving.raw import connected, last, post
from tests.serving.samples import EVIL, encoded, pickled
from tests.serving.server import serving


def expected(model: Model, pixels: npt.NDArray[np.uint8], top_k: int = 5) -> list[dict[str, object]]:
    predictions = top_predictions(model.logits(pixels[np.newaxis])[0], model.classes, top_k)
    # Results may differ in the last bits with the size of the batch.
    return [{**p, "probability": pytest.approx(p["probability"], abs=1e-4)} for p in predictions]


def at(place: str, **values: str) -> dict[str, Any]:
    """Arguments that send values as form fields ("data") or in the query ("params")."""
    return {place: values}


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of an error answer, whose form is checked."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert "Traceback" not in response.text
    return response.status_code, body["error"]["code"], body["error"]["message"]


def test_classify_a_form(client: httpx.Client, model: Model, images: npt.NDArray[np.uint8]) -> None:
    response = client.post("/classify", files={"image": ("a.png", encoded(images[0]))})
    assert response.status_code == 200
    assert response.json() == {
        "predictions": expected(model, images[0]),
        "model": {"name": model.name, "version": model.version},
    }


@pytest.mark.parametrize("top_k", [1, 10])
@pytest.mark.parametrize("place", ["data", "params"])
def test_top_k_as_field_or_parameter(
    client: httpx.Client, model: Model, images: npt.NDArray[np.uint8], top_k: int, place: str
) -> None:
    response = client.post(
        "/classify",
        files={"image": ("a.png", encoded(images[1]))},
        **at(place, top_k=str(top_k)),
    )
    assert response.json()["predictions"] == expected(model, images[1], top_k)


def test_all_ten_probabilities_sum_to_one(client: httpx.Client, images: npt.NDArray[np.uint8]) -> None:
    response = client.post(
        "/classify", files={"image": ("a.png", encoded(images[2]))}, params={"top_k": "10"}
    )
    predictions = response.json()["predictions"]
    assert sum(p["probability"] for p in predictions) == pytest.approx(1, abs=1e-9)
    assert sorted(p["index"] for p in predictions) == list(range(10))
    assert all(p["label"] == CLASSES[p["index"]] for p in predictions)
    probabilities = [p["probability"] for p in predictions]
    assert probabilities == sorted(probabilities, reverse=True)


def test_top_k_twice(client: httpx.Client, images: npt.NDArray[np.uint8]) -> None:
    """Neither value takes precedence: a wrong one would go unnoticed."""
    image = {"image": ("a.png", encoded(images[1]))}
    for field, query in (("3", ["11"]), ("3", ["3"]), (None, ["3", "4"])):
        data = {} if field is None else {"top_k": field}
        response = client.post("/classify", files=image, data=data, params={"top_k": query})
        assert error_of(response)[:2] == (422, "invalid_field")
        assert "top_k is given 2 times" in response.text


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/anything; a=b"])
def test_classify_a_raw_body(
    client: httpx.Client, model: Model, images: npt.NDArray[np.uint8], media_type: str
) -> None:
    """The content decides the format, whatever the header says."""
    response = client.post("/classify", content=encoded(images[3]), headers={"Content-Type": media_type})
    assert response.json()["predictions"] == expected(model, images[3])


def test_classify_batch_answers_in_order_and_keeps_bad_ones_apart(
    client: httpx.Client, model: Model, images: npt.NDArray[np.uint8]
) -> None:
    contents = [encoded(images[0]), b"no image", encoded(np.zeros((2000, 1000, 3), np.uint8))]
    contents += [encoded(image) for image in images[1:30]]
    response = client.post(
        "/classify_batch",
        files=[("images", (f"{i}.png", content)) for i, content in enumerate(contents)],
        data={"top_k": "2"},
    )
    assert response.status_code == 200
    answers = response.json()
    assert [answer.get("error", {}).get("code") for answer in answers] == [
        None,
        "bad_image",
        "too_large",
        *[None] * 29,
    ]
    good = [answer["predictions"] for answer in answers if "predictions" in answer]
    assert good == [expected(model, image, 2) for image in images[:30]]


def test_a_single_image_does_not_wait_for_those_of_a_batch(
    tmp_path: Path, images: npt.NDArray[np.uint8]
) -> None:
    large = encoded(np.zeros((1900, 1900, 3), np.uint8))
    batch = [("images", (f"{number}.png", large)) for number in range(64)]
    with (
        serving(tmp_path, SERVING_THREADS="1") as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answers = pool.submit(httpx.post, f"{url}/classify_batch", files=batch, timeout=120)
        while not under_way(client):
            assert not answers.done()
        picture = {"image": ("a.jpg", encoded(images[0], "JPEG"))}
        for _ in range(20):  # the first ones may come before the batch has been read
            assert client.post("/classify", files=picture).status_code == 200
        assert not answers.done()
        assert len(answers.result().json()) == 64


def test_an_image_does_not_wait_for_large_ones(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    content = encoded(np.zeros((5000, 5000, 3), np.uint8))
    large = last(post("/classify", len(content))) + content
    small = {"image": ("a.jpg", encoded(images[0], "JPEG"))}
    with (
        serving(tmp_path, SERVING_THREADS="1") as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ExitStack() as stack,
    ):
        connections = [stack.enter_context(connected(url)) for _ in range(8)]
        for connection in connections:
            connection.sendall(large[:-1])
        while under_way(client) < len(connections):
            pass
        for connection in connections:  # together, so that they wait for each other
            connection.sendall(large[-1:])
        assert client.post("/classify", files=small).status_code == 200
        answered, _, _ = select(connections, [], [], 0)
        assert len(answered) < len(connections)
        for connection in connections:
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200 ")


def test_concurrent_requests_get_their_own_answers(
    url: str, model: Model, images: npt.NDArray[np.uint8]
) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(
                *(
                    client.post("/classify", files={"image": ("a.png", encoded(image))})
                    for image in images[:60]
                )
            )

    for response, image in zip(asyncio.run(ask()), images[:60], strict=True):
        assert response.json()["predictions"] == expected(model, image)


def test_submission(client: httpx.Client, model: Model, images: npt.NDArray[np.uint8]) -> None:
    images = images[:300]
    ids = np.random.default_rng(0).permutation(len(images))
    content = pickled({b"data": images, b"ids": ids}, 4, old=True)
    response = client.post("/submission", files={"file": ("test.pkl", content)})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/csv")
    labels = model.logits(images).argmax(axis=1)
    rows = [f"{id_},{label}" for id_, label in zip(ids, labels, strict=True)]
    assert response.text == "\n".join(["ID,Labels", *rows, ""])


def test_model(client: httpx.Client, model: Model) -> None:
    assert client.get("/model").json() == {
        **model.metadata,
        "provider": "CPUExecutionProvider",
        "provider_reason": "asked for by name",
    }


def test_bentomls_own_client(
    url: str, model: Model, images: npt.NDArray[np.uint8], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=False):
        path.write_bytes(encoded(image))
    (tmp_path / "test.pkl").write_bytes(pickle.dumps({"data": images[:9]}))
    with bentoml.SyncHTTPClient(url) as client:
        answer = client.classify(image=paths[0], top_k=3)
        assert answer["predictions"] == expected(model, images[0], 3)
        answers = client.classify_batch(images=paths)
        assert [a["predictions"] for a in answers] == [expected(model, i) for i in images[:3]]
        csv = client.submission(file=tmp_path / "test.pkl")
        assert csv.splitlines()[0] == "ID,Labels"
        assert len(csv.splitlines()) == 10


PNG = encoded(np.zeros((4, 4, 3), np.uint8))
NOISE = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("path", "request_", "status", "code", "message"),
    [
        ("/classify", {"files": {"image": b"hello"}}, 400, "bad_image", "not a PNG, JPEG"),
        (
            "/classify",
            {"files": {"image": NOISE[: len(NOISE) // 2]}},
            400,
            "bad_image",
            "truncated",
        ),
        ("/classify", {"files": {"image": b""}}, 400, "bad_image", "0 bytes"),
        ("/classify", {"files": {"picture": PNG}}, 422, "invalid_field", "unknown field 'picture'"),
        ("/classify", {"files": {"top_k": (None, "3")}}, 422, "invalid_field", "-F image=@FILE"),
        ("/classify", {"files": [("image", PNG)] * 2}, 422, "invalid_field", "one"),
        ("/classify", {"files": {"image": (None, "a.png")}}, 422, "invalid_field", "holds text"),
        ("/classify", {"json": {"image": "a.png"}}, 415, "unsupported_media_type", "image/*"),
        (
            "/classify",
            {"content": PNG},
            415,
            "unsupported_media_type",
            "from `curl -F image=@FILE`, or,",
        ),
        ("/submission", {"content": PNG}, 415, "unsupported_media_type", "from `curl -F file=@FILE`."),
        ("/classify", {"content": b"x", "headers": FORM}, 400, "bad_request", "multipart"),
        (
            "/classify",
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            "bad_request",
            "boundary",
        ),
        (
            "/classify",
            {"content": b"x", "headers": {"Content-Type": "application/vnd.bentoml+pickle"}},
            415,
            "unsupported_media_type",
            "",
        ),
        (
            "/classify",
            {"files": {"image": encoded(np.zeros((2000, 1000, 3), np.uint8))}},
            413,
            "too_large",
            "1000x2000 pixels",
        ),
        ("/classify_batch", {"files": {"image": PNG}}, 422, "invalid_field", "'image'"),
        ("/classify_batch", {"files": [("images", PNG)] * 41}, 413, "too_large", "limit is 40"),
        (
            "/classify_batch",
            {"content": PNG, "headers": {"Content-Type": "image/png"}},
            415,
            "unsupported_media_type",
            "",
        ),
        ("/submission", {"files": {"file": b"hello"}}, 400, "bad_pickle", "not a pickle"),
        ("/submission", {"files": {"data": b"hello"}}, 422, "invalid_field", "unknown field"),
        (
            "/classify?topk=1",
            {"files": {"image": PNG}},
            422,
            "invalid_field",
            "'topk'; right would be top_k",
        ),
        ("/classify_batch?a", {"files": {"images": PNG}}, 422, "invalid_field", "'a'"),
        ("/submission?top_k=1", {"files": {"file": b"hello"}}, 422, "invalid_field", "would be none"),
        (
            "/submission",
            {"files": {"file": pickle.dumps({"data": np.zeros((1001, 3072), np.uint8)})}},
            413,
            "too_large",
            "1001 images; the limit is 1000",
        ),
        ("/nothing", {}, 404, "not_found", "nothing at /nothing"),
        ("/model", {}, 405, "method_not_allowed", "POST is not a method of /model; right would be GET"),
    ],
)
def test_errors(
    client: httpx.Client,
    path: str,
    request_: dict[str, Any],
    status: int,
    code: str,
    message: str,
) -> None:
    response = client.post(path, **request_)
    found = error_of(response)
    assert found[:2] == (status, code)
    assert message in found[2]
    assert client.post("/classify", files={"image": PNG}).status_code == 200


@pytest.mark.parametrize("top_k", ["0", "11", "-1", "2.0", "x", "", " 3", "1e0", "\u0663"])
def test_top_k_out_of_range(client: httpx.Client, top_k: str) -> None:
    for place in ("params", "data"):
        response = client.post("/classify", files={"image": PNG}, **at(place, top_k=top_k))
        assert error_of(response)[:2] == (422, "invalid_field")


def test_wrong_method(client: httpx.Client) -> None:
    response = client.get("/classify")
    assert error_of(response)[:2] == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/classify/", "/model/", "/metrics/", "/classify//"])
def test_a_slash_too_many_redirects_nowhere(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST"):
        response = client.request(method, path, headers={"Host": "elsewhere.example"})
        assert error_of(response) == (
            404,
            "not_found",
            f"There is nothing at {path}; see / for what there is.",
        )
        assert "elsewhere" not in str(response.headers)


@pytest.mark.parametrize("path", ["/classify", "/model", "/healthz", "/v2"])
def test_a_line_break_behind_a_path_is_another_path(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST"):
        assert client.request(method, f"{path}%0A", files={"image": PNG}).status_code == 404


def test_under_v2_a_slash_too_many_has_the_protocols_error(client: httpx.Client) -> None:
    for path in ("/v2/", "/v2/models/accurate/", "/v2/health/ready/"):
        response = client.get(path)
        assert response.status_code == 404
        assert response.json() == {"error": f"There is nothing at {path}; see / for what there is."}


@pytest.mark.parametrize("content", EVIL.values(), ids=EVIL.keys())
def test_hostile_pickles(client: httpx.Client, content: bytes) -> None:
    response = client.post("/submission", files={"file": ("a.pkl", content)})
    assert error_of(response)[:2] == (400, "bad_pickle")
    assert not (ROOT / "ran").exists()


MOST_BYTES, TOO_MANY_BYTES = 4_000_000, 5_000_000


@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/classify", "image/png"),
        ("/classify", "multipart/form-data; boundary=x"),
        ("/classify_batch", "multipart/form-data; boundary=x"),
        ("/submission", "multipart/form-data; boundary=x"),
    ],
)
def test_too_many_bytes(client: httpx.Client, path: str, kind: str, chunked: bool) -> None:
    """This includes a body that does not declare its length: it is refused while it arrives."""

    def parts() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(TOO_MANY_BYTES // 100_000):
            yield bytes(100_000)

    content = parts() if chunked else b"".join(parts())
    response = client.post(path, content=content, headers={"Content-Type": kind})
    assert error_of(response)[:2] == (413, "too_large")


@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_as_many_bytes_as_the_limit_are_taken(client: httpx.Client, chunked: bool) -> None:
    for length, right in ((MOST_BYTES, (400, "bad_image")), (MOST_BYTES + 1, (413, "too_large"))):
        content = iter([bytes(length)]) if chunked else bytes(length)
        response = client.post("/classify", content=content, headers={"Content-Type": "image/png"})
        assert error_of(response)[:2] == right


def test_a_url_is_never_fetched(client: httpx.Client) -> None:
    """BentoML's own parsing would fetch it; here a server sees that nobody asks for it."""
    visits: list[str] = []

    class Counter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)

    with listening(Counter) as server:
        address = f"{server}/a.png"
        for path, name in [
            ("/classify", "image"),
            ("/classify_batch", "images"),
            ("/submission", "file"),
        ]:
            as_field = client.post(path, files={name: (None, address)})
            assert error_of(as_field)[:2] == (422, "invalid_field")
            for request in (
                {"data": {name: address}},
                {"json": {name: address}},
                {"content": address, "headers": {"Content-Type": "text/plain"}},
            ):
                assert error_of(client.post(path, **request))[0] == 415
        as_image = client.post("/classify", content=address, headers={"Content-Type": "image/png"})
        assert error_of(as_image)[:2] == (400, "bad_image")
        assert visits == []
        assert httpx.get(address, timeout=60).status_code == 200  # a visit would have been seen
        assert visits == ["/a.png"]


def test_the_document_describes_the_endpoints(client: httpx.Client) -> None:
    document = client.get("/docs.json").json()
    version = client.get("/model").json()["version"]
    assert (document["info"]["title"], document["info"]["version"]) == ("CIFAR-10 classifier", version)
    assert document["openapi"].startswith("3.")
    operations = {
        path: next(iter(item.values()))
        for path, item in document["paths"].items()
        if path in ("/classify", "/classify_batch", "/submission", "/model")
    }
    assert len(operations) == 4
    for operation in operations.values():
        (content,) = operation["responses"]["200"]["content"].values()
        assert content["example"]
    answers = {path: operation["responses"] for path, operation in operations.items()}
    unreadable = answers["/submission"]["400"]["content"]["application/json"]["example"]
    assert unreadable["error"]["code"] == "bad_pickle"
    assert list(answers["/model"]) == ["200", "401", "500", "503", "504"]
    form = operations["/classify"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["image"] == {"type": "string", "format": "binary"}
    assert form["required"] == ["image"]
    references = {
        line.split('"')[-2] for line in json.dumps(document, indent=0).splitlines() if "$ref" in line
    }
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references <= known
    assert list(document["paths"]["/readyz"]["get"]["responses"]) == ["200", "503"]
