"""Reading requests: forms with files, raw images, and the parameter `top_k`.

BentoML's own parsing is not used: for a file field it would fetch a URL that the client names, it
answers a bad image with 500, and its errors have another shape. The classes here describe each form to
BentoML (for its schema.json and, by that, its client), and pass the request itself to the endpoint.
"""

# BentoML ships without types: its base classes are Any.
# mypy: disable-error-code="misc"

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from bentoml import IODescriptor
from pydantic import ConfigDict, Field, WithJsonSchema
from starlette.requests import Request

from serving.errors import FieldError, MediaTypeError
from serving.forms import Part, received

File = Annotated[bytes, WithJsonSchema({"type": "file", "format": "binary"})]
DEFAULT_TOP_K = 5
MAX_TOP_K = 10
TopK = Annotated[int, Field(ge=1, le=MAX_TOP_K, description="How many classes to answer with.")]


class _Received(IODescriptor):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    request: Request


class Form(IODescriptor):
    """A form that BentoML describes and the endpoint reads."""

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> IODescriptor:
        """Pass the request on unread, so that its errors are answered in our shape."""
        return _Received.model_construct(request=request)


class ClassifyForm(Form):
    """One image."""

    image: File
    top_k: TopK = DEFAULT_TOP_K


class ClassifyBatchForm(Form):
    """Several images, as fields with the same name."""

    images: list[File]
    top_k: TopK = DEFAULT_TOP_K


class SubmissionForm(Form):
    """A pickle of images."""

    file: File


async def read_image(request: Request) -> tuple[bytes, int]:
    """Return the image's bytes and `top_k`, from a form or from a body that is the image itself.

    Raises:
        MediaTypeError: the Content-Type is another.
        FieldError: a parameter or field is unknown, missing, or has a value that cannot be used.
        RequestError, TooLargeError, OverloadedError: as `serving.forms.received`.
    """
    _check_query(request, "top_k")
    if _media_type(request).startswith("image/"):
        return await request.body(), _top_k(request, [])
    async with _form(request, ClassifyForm, max_files=1) as parts:
        (image,) = _files(parts, "image")
        return image.content(), _top_k(request, parts)


async def read_images(request: Request, max_images: int) -> tuple[list[bytes], int]:
    """Return the bytes of each image, in the order of the form, and `top_k`.

    Raises:
        MediaTypeError: the Content-Type is another.
        FieldError: a parameter or field is unknown, missing, or has a value that cannot be used.
        RequestError, TooLargeError, OverloadedError: as `serving.forms.received`.
    """
    _check_query(request, "top_k")
    async with _form(request, ClassifyBatchForm, max_files=max_images) as parts:
        images = _files(parts, "images")
        return [image.content() for image in images], _top_k(request, parts)


@asynccontextmanager
async def read_file(request: Request) -> AsyncIterator[Part]:
    """Receive the uploaded file, which is on disk if it is large and is deleted on exit.

    Raises:
        MediaTypeError: the Content-Type is another.
        FieldError: a parameter or field is unknown, missing, or has a value that cannot be used.
        RequestError, TooLargeError, OverloadedError: as `serving.forms.received`.
    """
    _check_query(request)
    async with _form(request, SubmissionForm, max_files=1) as parts:
        (file,) = _files(parts, "file")
        yield file


def _check_query(request: Request, *known: str) -> None:
    """Raise `FieldError` for an unknown parameter, so that a misspelt one is not ignored."""
    for name in request.query_params if request.scope["query_string"] else ():
        if name not in known:
            raise FieldError(
                f"The query has the unknown parameter {name[:100]!r}; "
                f"right would be {' or '.join(known) or 'none'}."
            )


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


@asynccontextmanager
async def _form(request: Request, spec: type[Form], max_files: int) -> AsyncIterator[list[Part]]:
    """Receive a multipart form that has only fields of `spec`."""
    media_type = _media_type(request)
    if media_type != "multipart/form-data":
        also = ", or, as a raw body, image/*" if spec is ClassifyForm else ""
        name = next(iter(spec.model_fields))  # of the file
        raise MediaTypeError(
            f"The Content-Type is {media_type[:100] or 'not set'!r}; "
            f"right would be multipart/form-data, as from `curl -F {name}=@FILE`{also}."
        )
    async with received(request, max_files) as parts:
        for part in parts:
            if part.name not in spec.model_fields:
                raise FieldError(
                    f"The form has the unknown field {part.name[:100]!r}; "
                    f"its fields are {', '.join(spec.model_fields)}."
                )
        yield parts


def _files(parts: Sequence[Part], name: str) -> list[Part]:
    files = [part for part in parts if part.name == name]
    if not files:
        raise FieldError(f"The form lacks the file field {name!r}, as in `curl -F {name}=@FILE`.")
    if not all(part.is_file for part in files):
        raise FieldError(
            f"The field {name!r} holds text; it must be a file, as in `curl -F {name}=@FILE` "
            "(URLs are not fetched)."
        )
    return files


def _top_k(request: Request, parts: Sequence[Part]) -> int:
    given: list[str | Part] = [part for part in parts if part.name == "top_k"]
    if request.scope["query_string"]:
        given += request.query_params.getlist("top_k")
    if not given:
        return DEFAULT_TOP_K
    if len(given) > 1:
        raise FieldError(
            f"top_k is given {len(given)} times; right would be once, as a field or in the query."
        )
    value = given[0]
    if isinstance(value, Part):
        if value.is_file:
            raise FieldError(f"top_k is a file; right would be a whole number from 1 to {MAX_TOP_K}.")
        value = value.content().decode(errors="replace")
    if value not in map(str, range(1, MAX_TOP_K + 1)):
        raise FieldError(
            f"top_k is {value[:20]!r}; right would be a whole number from 1 to {MAX_TOP_K}."
        )
    return int(value)
