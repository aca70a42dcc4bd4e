"""The OpenAPI document: BentoML's own for the health checks, ours for the endpoints.

BentoML's would describe files as `type: file`, which OpenAPI 3 does not have, and would lack our GET
endpoints, the status codes and the examples.
"""

from collections.abc import Callable, Iterable
from typing import Any

from pydantic.json_schema import models_json_schema

from serving.errors import (
    FieldError,
    ImageError,
    InternalError,
    MediaTypeError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PickleError,
    RequestError,
    RequestTimeoutError,
    SlowBodyError,
    TooLargeError,
    UnauthorizedError,
)
from serving.inference_protocol import JSON_LENGTH, InferenceRequest
from serving.middleware import OPEN_PATHS
from serving.requests import DEFAULT_TOP_K, MAX_TOP_K
from serving.responses import Classification, ErrorBody, error_body

Json = dict[str, Any]

FILE: Json = {"type": "string", "format": "binary"}
TOP_K: Json = {
    "type": "integer",
    "minimum": 1,
    "maximum": MAX_TOP_K,
    "description": "How many classes to answer with, most probable first.",
}
TOP_K_FIELD: Json = {**TOP_K, "default": DEFAULT_TOP_K}
# Without a default, which the page would send besides the form's field: `top_k` twice is an error.
TOP_K_PARAMETER: Json = {
    "name": "top_k",
    "in": "query",
    "description": "Instead of the form's field.",
    "schema": TOP_K,
}
JSON_LENGTH_PARAMETER: Json = {
    "name": JSON_LENGTH,
    "in": "header",
    "description": "Bytes of JSON before those of a tensor; 0 where the body is the values of images.",
    "schema": {"type": "integer", "minimum": 0},
}

CLASSIFICATION_EXAMPLE: Json = {
    "predictions": [
        {"label": "cat", "index": 3, "probability": 0.97},
        {"label": "dog", "index": 5, "probability": 0.02},
    ],
    "model": {"name": "fast", "version": "0123456789ab"},
}
INFERENCE_EXAMPLE: Json = {
    "inputs": [{"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [0]}],
    "outputs": [{"name": "probabilities", "parameters": {"classification": DEFAULT_TOP_K}}],
}
ERRORS: dict[type[RequestError], str] = {
    RequestError: "The form, or the JSON, cannot be read.",
    ImageError: "The bytes are not a PNG, JPEG, WebP, GIF or BMP image, or the form cannot be read.",
    PickleError: "The pickle or the form cannot be read.",
    UnauthorizedError: "The service asks for a key, and the request lacks it.",
    NotFoundError: "Another model or version.",
    SlowBodyError: "The body took too long to arrive.",
    TooLargeError: "More bytes, pixels, images or rows than the service allows.",
    MediaTypeError: "A Content-Type that the endpoint does not read, or a Content-Encoding.",
    FieldError: "A field that is missing, unknown or has an unusable value.",
    InternalError: "A fault of the service; its log says why.",
    NotReadyError: "Requests would be refused now.",
    OverloadedError: "Too many requests wait, or the service stops; come again after Retry-After.",
    RequestTimeoutError: "The answer took too long.",
}
OF_ANY = (UnauthorizedError, InternalError, OverloadedError, RequestTimeoutError)
OF_A_BODY = (SlowBodyError, TooLargeError, MediaTypeError, FieldError)


def openapi_document(base: Json, version: str, *, with_key: bool) -> Json:
    """Return BentoML's document `base` with our own description of our endpoints.

    Args:
        base: the document that BentoML would show.
        version: the model's version, shown as the document's.
        with_key: whether the service asks for a key.
    """
    definitions = models_json_schema(
        [
            (Classification, "serialization"),
            (ErrorBody, "serialization"),
            (InferenceRequest, "validation"),
        ],
        ref_template="#/components/schemas/{model}",
    )[1]["$defs"]
    health = {path: item for path, item in base["paths"].items() if "get" in item}
    not_ready = base["paths"]["/readyz"]["get"]
    not_ready = {**not_ready, "responses": {**not_ready["responses"], **_errors(NotReadyError)}}
    title = "CIFAR-10 classifier"
    info = {
        "title": title,  # which BentoML's page hides
        "version": version,
        "description": f"# {title}\n\nClassifies images into the classes of CIFAR-10.",
    }
    document = {
        **base,
        "openapi": "3.1.0",  # the version that pydantic's schemas are for
        "info": info,
        "paths": {**_paths(), **health, "/readyz": {"get": not_ready}},
        "components": {"schemas": definitions},
    }
    if with_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in OPEN_PATHS:
            document["paths"][path]["get"] |= {"security": []}
    return document


def _paths() -> Json:
    classification: Json = {"$ref": "#/components/schemas/Classification"}
    error: Json = {"$ref": "#/components/schemas/ErrorBody"}
    return {
        "/classify": {
            "post": _operation(
                "classify",
                "Classify one image",
                "A PNG, JPEG, WebP, GIF or BMP file of any size, as a form field or as the body. "
                "The centred square of the image is what counts.",
                {
                    "multipart/form-data": _form({"image": FILE, "top_k": TOP_K_FIELD}, "image"),
                    "image/*": {"schema": FILE},
                },
                {"application/json": _content(classification, CLASSIFICATION_EXAMPLE)},
                [TOP_K_PARAMETER],
                ImageError,
            )
        },
        "/classify_batch": {
            "post": _operation(
                "classify_batch",
                "Classify several images",
                "Answers in the order of the images; the answer to a bad image is its error.",
                {
                    "multipart/form-data": _form(
                        {"images": {"type": "array", "items": FILE}, "top_k": TOP_K_FIELD}, "images"
                    )
                },
                {
                    "application/json": _content(
                        {"type": "array", "items": {"oneOf": [classification, error]}},
                        [CLASSIFICATION_EXAMPLE, error_body(ImageError.code, ERRORS[ImageError])],
                    )
                },
                [TOP_K_PARAMETER],
                RequestError,
            )
        },
        "/submission": {
            "post": _operation(
                "submission",
                "Label a pickle of images",
                "A pickled dict (protocol 2 to 5) with data: uint8 [N, 32, 32, 3], [N, 3, 32, 32] "
                "or [N, 3072] (all red values, then green, then blue), and optionally ids: N different "
                "integers.",
                {"multipart/form-data": _form({"file": FILE}, "file")},
                {"text/csv": _content({"type": "string"}, "ID,Labels\n0,3\n1,8\n")},
                [],
                PickleError,
            )
        },
        "/model": {
            "get": {
                "tags": ["Service APIs"],
                "operationId": "model",
                "summary": "What the model file says of itself",
                "responses": {
                    "200": {
                        "description": "The model's metadata and the provider that runs it.",
                        "content": {
                            "application/json": _content(
                                {"type": "object"},
                                {"name": "fast", "version": "0123456789ab", "precision": "fp32"},
                            )
                        },
                    },
                    **_errors(*OF_ANY),
                },
            }
        },
        **_inference_protocol(),
    }


def _inference_protocol() -> Json:
    """Return the Open Inference Protocol's paths; the protocol itself has the schemas of the answers."""
    name: Json = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    json: Json = {"application/json": {"schema": {"type": "object"}}}
    answers: Json = {"200": {"description": "As the protocol has it.", "content": json}}
    failure: Json = {"type": "object", "properties": {"error": {"type": "string"}}}

    def operation(
        operation_id: str, summary: str, parameters: list[Json], *errors: type[RequestError]
    ) -> Json:
        refusals = _refusals(errors, failure, lambda error: {"error": ERRORS[error]})
        return {
            "tags": ["Open Inference Protocol"],
            "operationId": operation_id,
            "summary": summary,
            "parameters": parameters,
            "responses": {**answers, **refusals},
        }

    paths: Json = {
        "/v2": {"get": operation("v2_server", "What the server can do", [], *OF_ANY)},
        "/v2/health/live": {"get": operation("v2_live", "Whether the process lives", [])},
        "/v2/health/ready": {
            "get": operation("v2_ready", "Whether requests are taken", [], NotReadyError)
        },
    }
    of_a_model = (*OF_ANY, NotFoundError)
    version = {**name, "name": "version"}
    for path, kind, named in (
        ("/v2/models/{name}", "model", [name]),
        ("/v2/models/{name}/versions/{version}", "version", [name, version]),
    ):
        infer = operation(
            f"v2_{kind}_infer",
            "images, UINT8 [N, 32, 32, 3], to logits and probabilities",
            [*named, JSON_LENGTH_PARAMETER],
            *(RequestError, *of_a_model, *OF_A_BODY),
        )
        answer = infer["responses"]["200"]
        as_bytes = answer["content"] | {"application/octet-stream": {}}
        infer["responses"] |= {"200": answer | {"content": as_bytes}}
        ready = operation(f"v2_{kind}_ready", "As /v2/health/ready", named, *of_a_model)
        request = _content({"$ref": "#/components/schemas/InferenceRequest"}, INFERENCE_EXAMPLE)
        infer["requestBody"] = {
            "description": "`data` has the 3,072 values of each image, of which the example shows one.",
            "required": True,
            "content": {"application/json": request, "application/octet-stream": {}},
        }
        paths |= {
            path: {"get": operation(f"v2_{kind}", "The model's tensors", named, *of_a_model)},
            f"{path}/ready": {"get": ready},
            f"{path}/infer": {"post": infer},
        }
    return paths


def _operation(
    name: str,
    summary: str,
    description: str,
    request: Json,
    answer: Json,
    parameters: list[Json],
    unreadable: type[RequestError],
) -> Json:
    return {
        "tags": ["Service APIs"],
        "operationId": name,
        "summary": summary,
        "description": description,
        "parameters": parameters,
        "requestBody": {"required": True, "content": request},
        "responses": {
            "200": {"description": "The answer.", "content": answer},
            **_errors(unreadable, *OF_ANY, *OF_A_BODY),
        },
    }


def _errors(*errors: type[RequestError]) -> Json:
    schema = {"$ref": "#/components/schemas/ErrorBody"}
    return _refusals(errors, schema, lambda error: error_body(error.code, ERRORS[error]))


def _refusals(
    errors: Iterable[type[RequestError]], schema: Json, body: Callable[[type[RequestError]], Json]
) -> Json:
    return {
        str(error.status): {
            "description": ERRORS[error],
            "content": {"application/json": _content(schema, body(error))},
        }
        for error in sorted(errors, key=lambda error: error.status)
    }


def _form(properties: Json, required: str) -> Json:
    return {"schema": {"type": "object", "required": [required], "properties": properties}}


def _content(schema: Json, example: Any) -> Json:
    return {"schema": schema, "example": example}
