"""The OpenAPI document: BentoML's own for the health checks, ours for the endpoints.

BentoML would describe files as `type: file`, which OpenAPI 3 does not know, knows no GET of ours,
no status codes and no examples.
"""

from typing import Any

from pydantic.json_schema import models_json_schema

from serving.requests import DEFAULT_TOP_K, MAX_TOP_K
from serving.responses import Classification, ErrorBody

Json = dict[str, Any]

FILE: Json = {"type": "string", "format": "binary"}
TOP_K: Json = {
    "type": "integer",
    "minimum": 1,
    "maximum": MAX_TOP_K,
    "default": DEFAULT_TOP_K,
    "description": "How many classes to answer with, most probable first.",
}
TOP_K_PARAMETER: Json = {"name": "top_k", "in": "query", "schema": TOP_K}

CLASSIFICATION_EXAMPLE: Json = {
    "predictions": [
        {"label": "cat", "index": 3, "probability": 0.97},
        {"label": "dog", "index": 5, "probability": 0.02},
    ],
    "model": {"name": "fast", "version": "0123456789ab"},
}
ERROR_EXAMPLE: Json = {
    "error": {
        "code": "bad_image",
        "message": "The bytes are not a PNG, JPEG, WebP, GIF or BMP image; send one of these formats.",
    }
}
ERRORS = {
    400: "The image or the pickle cannot be read.",
    401: "The service asks for a key, and the request lacks it.",
    408: "The body took too long to arrive.",
    413: "More bytes, pixels, images or rows than the service allows.",
    415: "A Content-Type that the endpoint does not read, or a Content-Encoding.",
    422: "A field that is missing, unknown or has an unusable value.",
    500: "A fault of the service; its log says why.",
    503: "Too many requests wait, or the service stops; try again after the seconds in Retry-After.",
    504: "The answer took too long.",
}


def openapi_document(base: Json, version: str) -> Json:
    """BentoML's document `base` with our endpoints in place of BentoML's account of them.

    Args:
        base: what BentoML would show.
        version: of the model, shown as the document's.
    """
    definitions = models_json_schema(
        [(Classification, "serialization"), (ErrorBody, "serialization")],
        ref_template="#/components/schemas/{model}",
    )[1]["$defs"]
    health = {path: item for path, item in base["paths"].items() if "get" in item}
    info = {
        "title": "CIFAR-10 classifier",
        "version": version,
        "description": "Classifies images into the classes of CIFAR-10.",
    }
    return {
        **base,
        "info": info,
        "paths": {**_paths(), **health},
        "components": {"schemas": definitions},
    }


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
                    "multipart/form-data": _form({"image": FILE, "top_k": TOP_K}, "image"),
                    "image/*": {"schema": FILE},
                },
                {"application/json": _content(classification, CLASSIFICATION_EXAMPLE)},
                [TOP_K_PARAMETER],
            )
        },
        "/classify_batch": {
            "post": _operation(
                "classify_batch",
                "Classify several images",
                "Answers in the order of the images; the answer to a bad image is its error.",
                {
                    "multipart/form-data": _form(
                        {"images": {"type": "array", "items": FILE}, "top_k": TOP_K}, "images"
                    )
                },
                {
                    "application/json": _content(
                        {"type": "array", "items": {"oneOf": [classification, error]}},
                        [CLASSIFICATION_EXAMPLE, ERROR_EXAMPLE],
                    )
                },
                [TOP_K_PARAMETER],
            )
        },
        "/submission": {
            "post": _operation(
                "submission",
                "Label a pickle of images",
                "A pickled dict (protocol 2 to 5) with data: uint8 [N, 32, 32, 3], [N, 3, 32, 32] "
                "or [N, 3072], and optionally ids: N different integers.",
                {"multipart/form-data": _form({"file": FILE}, "file")},
                {"text/csv": _content({"type": "string"}, "ID,Labels\n0,3\n1,8\n")},
                [],
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
                    **_errors(),
                },
            }
        },
        **_inference_protocol(),
    }


def _inference_protocol() -> Json:
    """The Open Inference Protocol's paths; its schemas are the protocol's."""
    name: Json = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    json: Json = {"application/json": {"schema": {"type": "object"}}}
    answers: Json = {"200": {"description": "As the protocol has it.", "content": json}}
    failure: Json = {"type": "object", "properties": {"error": {"type": "string"}}}
    refusals: Json = {
        str(status): {"description": text, "content": {"application/json": {"schema": failure}}}
        for status, text in {**ERRORS, 404: "Another model or version."}.items()
    }

    def operation(operation_id: str, summary: str, parameters: list[Json]) -> Json:
        return {
            "tags": ["Open Inference Protocol"],
            "operationId": operation_id,
            "summary": summary,
            "parameters": parameters,
            "responses": answers if operation_id == "v2_live" else {**answers, **refusals},
        }

    paths: Json = {
        "/v2": {"get": operation("v2_server", "What the server can do", [])},
        "/v2/health/live": {"get": operation("v2_live", "Whether the process lives", [])},
        "/v2/health/ready": {"get": operation("v2_ready", "Whether requests are taken", [])},
    }
    version = {**name, "name": "version"}
    for path, kind, named in (
        ("/v2/models/{name}", "model", [name]),
        ("/v2/models/{name}/versions/{version}", "version", [name, version]),
    ):
        infer = operation(
            f"v2_{kind}_infer", "images, UINT8 [N, 32, 32, 3], to logits and probabilities", named
        )
        infer["requestBody"] = {"required": True, "content": {**json, "application/octet-stream": {}}}
        paths |= {
            path: {"get": operation(f"v2_{kind}", "The model's tensors", named)},
            f"{path}/ready": {"get": operation(f"v2_{kind}_ready", "As /v2/health/ready", named)},
            f"{path}/infer": {"post": infer},
        }
    return paths


def _operation(
    name: str, summary: str, description: str, request: Json, answer: Json, parameters: list[Json]
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
            **_errors(),
        },
    }


def _errors() -> Json:
    error = {"application/json": _content({"$ref": "#/components/schemas/ErrorBody"}, ERROR_EXAMPLE)}
    return {str(status): {"description": text, "content": error} for status, text in ERRORS.items()}


def _form(properties: Json, required: str) -> Json:
    return {"schema": {"type": "object", "required": [required], "properties": properties}}


def _content(schema: Json, example: Any) -> Json:
    return {"schema": schema, "example": example}
