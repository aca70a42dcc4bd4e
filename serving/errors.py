"""Exceptions for all that can go wrong, with the HTTP status and the stable code that a client sees.

The message of a `RequestError` says what was wrong and what would be right. It never has a file's path,
a traceback or input that the client did not send itself.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar, Literal

Lacking = Literal["queue", "uploads", "disk", "reports"]


class StartError(Exception):
    """The service cannot start: its settings, model file or provider are not usable."""


class SettingsError(StartError):
    """An environment variable is unknown or has an unusable value."""


class ModelError(StartError):
    """The model file is missing, is not ONNX, does not keep the contract or fails when it is run."""


class ProviderError(StartError):
    """An execution provider is not usable here, or does not run the model."""


class NoProviderError(ProviderError):
    """The provider, its libraries or its device are missing on this machine."""


class RequestError(Exception):
    """A request that is answered with an error; other requests are not affected."""

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    code: ClassVar[str] = "bad_request"
    headers: ClassVar[Mapping[str, str]] = {}


class ImageError(RequestError):
    """Bytes that are not a readable image."""

    code = "bad_image"


class PickleError(RequestError):
    """A pickle that is damaged, or holds anything but plain data and arrays of numbers."""

    code = "bad_pickle"


class UnauthorizedError(RequestError):
    """A request without the key that the service asks for."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class SlowBodyError(RequestError):
    """A body that takes longer to arrive than the settings allow."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "slow_body"
    headers: ClassVar[Mapping[str, str]] = {"Connection": "close"}


class NotFoundError(RequestError):
    """A request for a model or version other than the one that is served."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class TooLargeError(RequestError):
    """More bytes, pixels, images or rows than the settings allow."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too_large"


class MediaTypeError(RequestError):
    """A Content-Type that the endpoint does not read, or any Content-Encoding."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media_type"


class FieldError(RequestError):
    """A form field or parameter that is missing, unknown or has an unusable value."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid_field"


class OverloadedError(RequestError):
    """The queue is full, or there is no room for an upload; the client should try again later.

    Attributes:
        lacking: what there is too little of, as the metrics call it.
    """

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "overloaded"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}

    def __init__(self, message: str, lacking: Lacking) -> None:
        super().__init__(message)
        self.lacking = lacking


class NotReadyError(RequestError):
    """The answer to a health check: new requests would be refused, or files of the server are gone."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "not_ready"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class StoppingError(RequestError):
    """The worker that got the request is about to end."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "stopping"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class RequestTimeoutError(RequestError):
    """The request took longer than the settings allow."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "timeout"


class InternalError(RequestError):
    """A fault of the service; the log has the details, the answer does not."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("The service failed; its log says why.")
