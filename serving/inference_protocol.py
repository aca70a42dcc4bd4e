"""The Open Inference Protocol, version 2: requests and answers as tritonclient and KServe speak them.

The input is `images`, uint8 [N, 32, 32, 3] RGB; the outputs are `logits` and `probabilities`, float32
[N, classes]. Tensors come and go as JSON or by the binary tensor data extension, its raw requests
included. With Triton's classification extension a client can ask for an output as its k best classes,
as text.
"""

import itertools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.responses import JSONResponse, Response

from serving.errors import FieldError, NotFoundError, RequestError, TooLargeError
from serving.model import Model
from serving.predictions import softmax

PREFIX = "/v2"
EXTENSIONS = ["binary_tensor_data", "classification"]
JSON_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON before the binary tensors
OUTPUTS = ("logits", "probabilities")
IMAGE = (32, 32, 3)
BYTES_A_VALUE = 8  # of JSON, generously; more is refused, as parsing takes many times that memory
MAX_TENSORS = 16  # in each list of a request; more are refused, before each of them has its error
# The characters that structure JSON, and how many of each an image has; texts and objects are around it.
SIGNS = ((b"[", 1 + 32 + 32 * 32), (b",", math.prod(IMAGE)), (b"{", 0), (b'"', 0))
AROUND = 10_000  # of each of them are allowed besides those of the images

Json = dict[str, Any]

# Lists that stop at the first error: to collect all errors takes a thousand times the JSON's memory.
Value = Annotated[int, Field(strict=True, ge=0, le=255)]
Size = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]  # errors show all of it
Values = Annotated[list[Value], Field(fail_fast=True)]
Pixel = Annotated[list[Value], Field(fail_fast=True, min_length=3, max_length=3)]
Row = Annotated[list[Pixel], Field(fail_fast=True, min_length=32, max_length=32)]
Image = Annotated[list[Row], Field(fail_fast=True, min_length=32, max_length=32)]
Images = Annotated[list[Image], Field(fail_fast=True)]


# Some clients send null for an object that has nothing in it.
OrNothing = BeforeValidator(lambda value: {} if value is None else value)


class InputParameters(BaseModel):
    """Parameters of an input: how many bytes it has after the JSON, if its data is there."""

    binary_data_size: Size | None = Field(None, ge=0)


class Input(BaseModel):
    """A tensor that the client sends."""

    name: str
    shape: Annotated[list[Size], Field(fail_fast=True, max_length=8)]
    datatype: str
    parameters: Annotated[InputParameters, OrNothing] = InputParameters()
    data: Values | Images | None = None


class OutputParameters(BaseModel):
    """Parameters of an output: whether to send bytes, and how many classes if it is wanted as text."""

    binary_data: bool | None = None
    classification: Size | None = Field(None, ge=1)


class Output(BaseModel):
    """A tensor that the client asks for."""

    name: str
    parameters: Annotated[OutputParameters, OrNothing] = OutputParameters()


class Parameters(BaseModel):
    """Parameters of a request: whether outputs that do not say so themselves are sent as bytes."""

    binary_data_output: bool | None = None


class InferenceRequest(BaseModel):
    """The JSON of a request; other keys are ignored, as the protocol demands."""

    id: str | None = None
    parameters: Annotated[Parameters, OrNothing] = Parameters()
    inputs: Annotated[list[Input], Field(fail_fast=True, max_length=MAX_TENSORS)]
    outputs: Annotated[list[Output], Field(fail_fast=True, max_length=MAX_TENSORS)] | None = None


@dataclass(frozen=True)
class Inference:
    """A parsed request: its images, uint8 [N, 32, 32, 3], the outputs it asks for, and its id."""

    images: npt.NDArray[np.uint8]
    outputs: list[Output]
    id: str | None


def is_protocol(path: str) -> bool:
    """Return whether a path belongs to the protocol, even if nothing is there."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def server_metadata(model: Model) -> Json:
    """The answer to GET /v2."""
    return {"name": "cifar10", "version": model.version, "extensions": EXTENSIONS}


def model_metadata(model: Model) -> Json:
    """The answer to GET /v2/models/NAME."""
    classes = len(model.classes)
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, *IMAGE]}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, classes]} for name in OUTPUTS],
    }


def check_named(model: Model, path: Mapping[str, str]) -> None:
    """Raise `NotFoundError` unless a path's name, and its version if it has one, are the model's."""
    if path["name"] != model.name or path.get("version", model.version) != model.version:
        raise NotFoundError(f"The only model here is {model.name}, version {model.version}.")


def read(body: bytes, json_length: str | None, max_images: int) -> Inference:
    """Read the body of a request.

    Args:
        body: JSON, followed by the binary tensors if there are any; or the pixels alone.
        json_length: the header Inference-Header-Content-Length: how many bytes are JSON; None for all.
        max_images: most images in a request.

    Raises:
        RequestError: the body is not a request of the protocol.
        FieldError: its tensors are not those of the model.
        TooLargeError: it has more than `max_images` images, or more JSON than these could need.
    """
    end = _json_end(body, json_length)
    if end == 0 and json_length is not None:
        return _raw(body, max_images)
    _check_length(body, end, max_images)
    request = _parsed(body[:end])
    tensor = _input(request)
    _check_count(tensor.shape[0], max_images)
    outputs = request.outputs or [Output(name=name) for name in OUTPUTS]
    _check_outputs(outputs)
    for output in outputs:
        if output.parameters.binary_data is None:
            output.parameters.binary_data = bool(request.parameters.binary_data_output)
    return Inference(_pixels(tensor, body[end:]), outputs, request.id)


def _json_end(body: bytes, json_length: str | None) -> int:
    if json_length is None:
        return len(body)
    if json_length.isdecimal() and len(json_length) < 20 and int(json_length) <= len(body):
        return int(json_length)
    raise RequestError(
        f"{JSON_LENGTH} is {json_length[:20]!r}; right would be the bytes of JSON in the body, "
        f"which has {len(body)} in all."
    )


def _check_length(body: bytes, end: int, max_images: int) -> None:
    """Raise `TooLargeError` for more JSON, up to `end`, than `max_images` images could need."""
    longest = max_images * math.prod(IMAGE) * BYTES_A_VALUE
    if end > longest:
        raise TooLargeError(
            f"The request's JSON has {end} bytes; the limit is {longest}. The binary tensor data "
            "extension takes less."
        )
    # The JSON is parsed in one call, during which all else waits, even for keys that are ignored.
    for sign, of_an_image in SIGNS:
        most = max_images * of_an_image + AROUND
        if body.count(sign, 0, end) > most:
            raise TooLargeError(f"The request's JSON has {sign.decode()!r} more than {most} times.")


def _parsed(text: bytes) -> InferenceRequest:
    try:
        return InferenceRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["loc"][:3] == ("inputs", 0, "data"):
            raise FieldError(
                "The data of images is not right; right would be whole numbers from 0 to 255, in one "
                "list or nested as [N, 32, 32, 3]."
            ) from None
        place = ".".join(map(str, first["loc"]))
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise RequestError(f"The request's JSON cannot be read: {what}") from None


def _input(request: InferenceRequest) -> Input:
    """Return the one tensor that the model takes; raise `FieldError` if it is another, or not alone."""
    names = [tensor.name[:100] for tensor in request.inputs[:4]]
    if names != ["images"]:
        raise FieldError(f"The inputs are {names}; right would be the one input 'images'.")
    (tensor,) = request.inputs
    if tensor.datatype != "UINT8":
        raise FieldError(f"images has the datatype {tensor.datatype[:20]!r}; right would be 'UINT8'.")
    if len(tensor.shape) != 4 or tuple(tensor.shape[1:]) != IMAGE or tensor.shape[0] < 1:
        raise FieldError(
            f"images has the shape {tensor.shape[:8]}; right would be [N, 32, 32, 3], N at least 1."
        )
    return tensor


def respond(inference: Inference, logits: npt.NDArray[np.float32], model: Model) -> Response:
    """Return the answer to an inference that gave `logits`, float32 [N, classes]."""
    described: list[Json] = []
    blobs: list[bytes] = []
    for output in inference.outputs:
        values = logits if output.name == "logits" else softmax(logits).astype(np.float32)
        count = output.parameters.classification
        texts = _best(values, model.classes, count) if count else None
        shape = [len(values), len(texts[0]) if texts else values.shape[1]]
        tensor: Json = {
            "name": output.name,
            "datatype": "BYTES" if texts else "FP32",
            "shape": shape,
        }
        if output.parameters.binary_data:
            blobs.append(_blob(texts) if texts else values.astype("<f4").tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = [*itertools.chain(*texts)] if texts else values.flatten().tolist()
        described.append(tensor)
    answer: Json = {"model_name": model.name, "model_version": model.version, "outputs": described}
    if inference.id is not None:
        answer["id"] = inference.id
    if not blobs:
        return JSONResponse(answer)
    head = json.dumps(answer).encode()
    return Response(
        b"".join([head, *blobs]),
        media_type="application/octet-stream",
        headers={JSON_LENGTH: str(len(head))},
    )


def _raw(body: bytes, max_images: int) -> Inference:
    """Read a body without JSON: it is the one input's pixels, and all outputs are sent as bytes."""
    size = math.prod(IMAGE)
    count, rest = divmod(len(body), size)
    if rest or not count:
        raise FieldError(
            f"The body has {len(body)} bytes and no JSON ({JSON_LENGTH} is 0); right would be {size} "
            "for each image."
        )
    _check_count(count, max_images)
    images = np.frombuffer(body, np.uint8).reshape(count, *IMAGE)
    as_bytes = OutputParameters(binary_data=True)
    return Inference(images, [Output(name=name, parameters=as_bytes) for name in OUTPUTS], None)


def _check_count(count: int, max_images: int) -> None:
    if count > max_images:
        raise TooLargeError(f"There are {count} images; the limit is {max_images}.")


def _check_outputs(outputs: list[Output]) -> None:
    names = [output.name[:100] for output in outputs]
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or len(set(names)) < len(names):
        raise FieldError(
            f"The outputs are {names[:4]}; right would be logits, probabilities or both, once each."
        )


def _pixels(tensor: Input, binary: bytes) -> npt.NDArray[np.uint8]:
    count = math.prod(tensor.shape)
    size = tensor.parameters.binary_data_size
    if size is not None:
        if tensor.data is not None:
            raise FieldError("images has data both in the JSON and after it; one would be right.")
        if not len(binary) == size == count:
            raise FieldError(
                f"images has binary_data_size {size} and {len(binary)} bytes after the JSON; its "
                f"shape {tensor.shape} needs {count}."
            )
        return np.frombuffer(binary, np.uint8).reshape(tensor.shape)
    if binary:
        raise FieldError("There are bytes after the JSON, but images has no binary_data_size.")
    if tensor.data is None:
        raise FieldError("images has no data; right would be data, or binary_data_size and bytes.")
    values = np.array(tensor.data, np.uint8)
    if values.size != count:
        raise FieldError(
            f"The data of images has the shape {list(values.shape)}; right would be {tensor.shape}, "
            f"or {count} values in one list."
        )
    return values.reshape(tensor.shape)


def _best(values: npt.NDArray[np.float32], classes: tuple[str, ...], count: int) -> list[list[str]]:
    """Return each image's `count` highest values as Triton writes them: value:index:label."""
    best = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return [
        [f"{row[index]:f}:{index}:{classes[index]}" for index in indices]
        for row, indices in zip(values, best, strict=True)
    ]


def _blob(texts: list[list[str]]) -> bytes:
    """Encode texts as BYTES elements: each is its length, a little-endian uint32, and then the text."""
    encoded = [text.encode() for row in texts for text in row]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
