"""The Open Inference Protocol: the real client of Triton, and requests by hand."""

import json
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from serving.model import Model
from serving.predictions import softmax
from tests.serving.models import CLASSES

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def triton(url: str) -> Any:
    with InferenceServerClient(url.removeprefix("http://")) as client:
        yield client


def sent(images: Pixels, *, binary: bool = True) -> Any:
    tensor = InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


def request(images: Pixels, **changes: Any) -> dict[str, Any]:
    """The JSON of a request; `changes` replace keys of its input."""
    tensor = {"name": "images", "shape": images.shape, "datatype": "UINT8", "data": images.tolist()}
    return {"inputs": [tensor | changes]}


def infer(client: httpx.Client, model: Model) -> str:
    return f"/v2/models/{model.name}/infer"


def test_client_reads_health_and_metadata(triton: Any, client: httpx.Client, model: Model) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready(model.name)
    assert triton.is_model_ready(model.name, model.version)
    assert not triton.is_model_ready("other")
    ready = client.get(f"/v2/models/{model.name}/ready").json()
    assert ready == {"name": model.name, "ready": True}
    server = triton.get_server_metadata()
    assert (server["name"], server["version"]) == ("cifar10", model.version)
    assert server["extensions"] == ["binary_tensor_data", "classification"]
    assert triton.get_model_metadata(model.name, model.version) == {
        "name": model.name,
        "versions": [model.version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
        ],
    }


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("binary", [True, False])
def test_client_infers(triton: Any, model: Model, images: Pixels, count: int, binary: bool) -> None:
    wanted = [InferRequestedOutput(name, binary_data=binary) for name in ("probabilities", "logits")]
    result = triton.infer(
        model.name, [sent(images[:count], binary=binary)], outputs=wanted, request_id="an id"
    )
    expected = model.logits(images[:count])
    np.testing.assert_allclose(result.as_numpy("logits"), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("probabilities"), softmax(expected), atol=1e-4)
    answer = result.get_response()
    assert [output["name"] for output in answer["outputs"]] == ["probabilities", "logits"]
    assert all(output["shape"] == [count, 10] for output in answer["outputs"])
    assert (answer["model_name"], answer["model_version"]) == (model.name, model.version)
    assert answer["id"] == "an id"


def test_outputs_that_are_not_named_come_all_and_as_bytes(
    triton: Any, model: Model, images: Pixels
) -> None:
    result = triton.infer(model.name, [sent(images[:2])], model_version=model.version)
    assert {"logits", "probabilities"} == {o["name"] for o in result.get_response()["outputs"]}
    assert result.get_output("logits")["parameters"] == {"binary_data_size": 80}
    assert result.as_numpy("logits").dtype == np.float32


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("asked", "given"), [(3, 3), (20, 10)])
def test_client_classifies(
    triton: Any, model: Model, images: Pixels, binary: bool, asked: int, given: int
) -> None:
    wanted = [InferRequestedOutput("probabilities", binary_data=binary, class_count=asked)]
    result = triton.infer(model.name, [sent(images[:4])], outputs=wanted).as_numpy("probabilities")
    assert result.shape == (4, given)
    for row, probabilities in zip(result, softmax(model.logits(images[:4])), strict=True):
        best = np.argsort(-probabilities)[:given]
        for text, index in zip(row, best, strict=True):
            value, shown, label = (text.decode() if binary else text).split(":")
            assert float(value) == pytest.approx(probabilities[index], abs=1e-4)
            assert (int(shown), label) == (index, CLASSES[index])


def test_client_gets_the_protocols_error_for_a_wrong_tensor(
    triton: Any, model: Model, images: Pixels
) -> None:
    floats = InferInput("images", [1, 32, 32, 3], "FP32")
    floats.set_data_from_numpy(images[:1].astype(np.float32))
    with pytest.raises(InferenceServerException, match="the datatype 'FP32'; right would be 'UINT8'"):
        triton.infer(model.name, [floats])
    with pytest.raises(InferenceServerException, match=r"the shape \[1, 16, 32, 3\]"):
        triton.infer(model.name, [sent(images[:1, :16])])
    with pytest.raises(InferenceServerException, match="The outputs are \\['boxes'\\]"):
        triton.infer(model.name, [sent(images[:1])], outputs=[InferRequestedOutput("boxes")])
    assert triton.is_server_ready()


@pytest.mark.parametrize("flat", [False, True])
def test_json_data_is_nested_or_flat(
    client: httpx.Client, model: Model, images: Pixels, flat: bool
) -> None:
    body = request(images[:2], data=(images[:2].flatten() if flat else images[:2]).tolist())
    answer = client.post(infer(client, model), json=body | {"unknown": 1, "id": "7"}).json()
    (logits,) = [output for output in answer["outputs"] if output["name"] == "logits"]
    np.testing.assert_allclose(
        np.reshape(logits["data"], logits["shape"]), model.logits(images[:2]), rtol=1e-4, atol=1e-4
    )
    assert answer["id"] == "7"


@pytest.mark.parametrize("parameters", [None, {"binary_data_output": None}])
def test_null_is_as_nothing(
    client: httpx.Client, model: Model, images: Pixels, parameters: dict[str, None] | None
) -> None:
    nothing = {"id": None, "parameters": parameters, "outputs": None}
    body = request(images[:1], parameters=None) | nothing
    path, wanted = infer(client, model), {"outputs": [{"name": "logits", "parameters": None}]}
    answer = client.post(path, json=body).json()
    assert [output["name"] for output in answer["outputs"]] == ["logits", "probabilities"]
    assert "id" not in answer
    (logits,) = client.post(path, json=body | wanted).json()["outputs"]
    assert logits["shape"] == [1, 10]


def test_what_an_output_says_goes_before_what_the_request_says_of_all(
    client: httpx.Client, model: Model, images: Pixels
) -> None:
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}, {"name": "probabilities"}]
    body = request(images[:1]) | {"parameters": {"binary_data_output": True}, "outputs": outputs}
    response = client.post(infer(client, model), json=body)
    answer = json.loads(response.content[: int(response.headers["Inference-Header-Content-Length"])])
    assert ["data" in output for output in answer["outputs"]] == [True, False]


@pytest.mark.parametrize("count", [1, 3])
def test_a_body_may_be_the_pixels_alone(
    client: httpx.Client, model: Model, images: Pixels, count: int
) -> None:
    """A raw binary request, which curl can send: the server infers the tensor's shape from the bytes."""
    headers = {"Inference-Header-Content-Length": "0"}
    response = client.post(infer(client, model), content=images[:count].tobytes(), headers=headers)
    answer = json.loads(response.content[: int(response.headers["Inference-Header-Content-Length"])])
    assert [output["name"] for output in answer["outputs"]] == ["logits", "probabilities"]
    sizes = [output["parameters"]["binary_data_size"] for output in answer["outputs"]]
    assert sizes == [40 * count] * 2
    logits = np.frombuffer(response.content[-80 * count : -40 * count], "<f4").reshape(count, 10)
    np.testing.assert_allclose(logits, model.logits(images[:count]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "status", "message"),
    [
        (0, 422, "The body has 0 bytes and no JSON"),
        (3071, 422, "right would be 3072 for each image"),
        (41 * 3072, 413, "There are 41 images; the limit is 40."),
    ],
)
def test_pixels_alone_that_are_no_images(
    client: httpx.Client, model: Model, size: int, status: int, message: str
) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    response = client.post(infer(client, model), content=bytes(size), headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"name": "pictures"}, 422, "The inputs are ['pictures']; right would be the one input 'images'."),
    ({"datatype": "INT8"}, 422, "images has the datatype 'INT8'"),
    ({"shape": [1, 3, 32, 32]}, 422, "images has the shape [1, 3, 32, 32]"),
    ({"shape": [0, 32, 32, 3]}, 422, "N at least 1"),
    ({"shape": [10**15, 32, 32, 3]}, 413, "There are 1000000000000000 images; the limit is 40."),
    ({"shape": [2, 32, 32, 3]}, 422, "The data of images has the shape [1, 32, 32, 3]"),
    ({"data": [[1, 2], [3]]}, 422, "nested as [N, 32, 32, 3]"),
    ({"data": ["a" * 100_000, *["a"] * 2500]}, 422, "whole numbers from 0 to 255"),
    ({"shape": [1] * 100_000}, 400, "inputs.0.shape: List should have at most 8 items"),
    ({"data": [256] * 3072}, 422, "whole numbers from 0 to 255"),
    ({"data": [-1] * 3072}, 422, "whole numbers from 0 to 255"),
    ({"data": [0.5] * 3072}, 422, "whole numbers from 0 to 255"),
    ({"data": [True] * 3072}, 422, "whole numbers from 0 to 255"),
    ({"data": [10**30] * 3072}, 422, "whole numbers from 0 to 255"),
    ({"data": ["1"] * 3072}, 422, "whole numbers from 0 to 255"),
    ({"data": None}, 422, "images has no data"),
    ({"parameters": {"binary_data_size": 3072}}, 422, "both in the JSON and after it"),
    ({"data": None, "parameters": {"binary_data_size": 3072}}, 422, "0 bytes after the JSON"),
    ({"data": None, "parameters": {"binary_data_size": -1}}, 400, "binary_data_size: Input should be"),
    ({"shape": "big"}, 400, "inputs.0.shape: Input should be a valid array"),
]


@pytest.mark.parametrize(("change", "status", "message"), WRONG)
def test_wrong_tensors_get_the_protocols_error(
    client: httpx.Client,
    model: Model,
    images: Pixels,
    change: dict[str, Any],
    status: int,
    message: str,
) -> None:
    response = client.post(infer(client, model), json=request(images[:1], **change))
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 400, "The request's JSON cannot be read"),
        (b"{", {}, 400, "The request's JSON cannot be read"),
        (b"[" * 50_000, {}, 400, "The request's JSON cannot be read"),
        (b"{}", {}, 400, "inputs: Field required"),
        (b"{}", {"Inference-Header-Content-Length": "3"}, 400, "which has 2 in all"),
        (b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "which has 2 in all"),
        (b"{}", {"Inference-Header-Content-Length": "9" * 5000}, 400, "which has 2 in all"),
        (b'{"inputs":[1' + b",1" * 100_000 + b"]}", {}, 400, "inputs.0: Input should be an object"),
        (
            b'{"inputs":[' + b",".join([b'{"name":"a","shape":[1],"datatype":"a"}'] * 20) + b"]}",
            {},
            400,
            "inputs: List should have at most 16 items",
        ),
        (b"no", {}, 400, "The request's JSON cannot be read: Invalid JSON"),
        (b'{"x":[' + b"[]," * 100_000 + b"[]]}", {}, 413, "JSON has '[' more than 52280 times"),
        (b'{"x":{' + b'"":1,' * 9_000 + b'"":1}}', {}, 413, "JSON has '\"' more than 10000 times"),
        (b" " * 2_000_000, {}, 413, "the limit is 983040. The binary tensor data extension"),
        (b" " * 5_000_000, {}, 413, "The body is too large"),
    ],
)
def test_bodies_that_are_no_request(
    client: httpx.Client,
    model: Model,
    body: bytes,
    headers: dict[str, str],
    status: int,
    message: str,
) -> None:
    response = client.post(infer(client, model), content=body, headers=headers)
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "There are bytes after the JSON"),
        (
            {"data": None, "parameters": {"binary_data_size": 3071}},
            "images has binary_data_size 3071 and 3072 bytes after the JSON",
        ),
    ],
)
def test_bytes_after_json_need_their_size(
    client: httpx.Client, model: Model, images: Pixels, change: dict[str, Any], message: str
) -> None:
    head = json.dumps(request(images[:1], **change)).encode()
    response = client.post(
        infer(client, model),
        content=head + images[0].tobytes(),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert response.status_code == 422
    assert response.json()["error"].startswith(message)


def test_a_compressed_request_is_told_to_come_as_it_is(
    triton: Any, client: httpx.Client, model: Model, images: Pixels
) -> None:
    message = "The body has the Content-Encoding 'gzip'; right would be none"
    tensor = InferInput("images", [1, 32, 32, 3], "UINT8")
    tensor.set_data_from_numpy(images[:1])
    with pytest.raises(InferenceServerException, match=message):
        triton.infer(model.name, [tensor], request_compression_algorithm="gzip")
    headers = {"Content-Type": "image/png", "Content-Encoding": "gzip"}
    response = client.post("/classify", content=b"any", headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["message"].startswith(message)
    headers["Content-Encoding"] = "Identity"
    assert client.post("/classify", content=b"any", headers=headers).status_code == 400


def test_other_names_and_paths_are_not_found(client: httpx.Client, model: Model) -> None:
    for path in ("/v2/models/other", f"/v2/models/{model.name}/versions/0/ready"):
        response = client.get(path)
        assert response.status_code == 404
        only = f"The only model here is {model.name}, version {model.version}."
        assert response.json() == {"error": only}
    response = client.get("/v2/repository/index")
    assert response.status_code == 404
    assert response.json() == {
        "error": "There is nothing at /v2/repository/index; see / for what there is."
    }
    assert client.get("/v20").json()["error"]["code"] == "not_found", "not the protocol's shape"
    response = client.get(f"/v2/models/{model.name}/infer")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
