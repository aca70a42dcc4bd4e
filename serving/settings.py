"""Settings from `SERVING_*` environment variables, validated in one place."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import loky
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from serving.errors import SettingsError

PREFIX = "SERVING_"
# The variables by which a server's workers know the process that started them, and share their figures
# and the last model file that passed.
SUPERVISOR = "CIFAR10_SUPERVISOR"
METRICS_FOLDER = "CIFAR10_METRICS_FOLDER"
KEPT_MODEL = "CIFAR10_KEPT_MODEL"

# What Kubernetes sets in all pods of a namespace for a Service there, such as one named `serving-api`.
# By its name, as far as the first "=": a key that looks like one is a key.
SERVICE_LINK = re.compile(
    r"[^=]*(_SERVICE_(HOST|PORT(_\w+)?)=|_PORT(_\d+_(TCP|UDP|SCTP))?=\w+://|_(TCP|UDP|SCTP)_\w+=)"
)

# Found beside the package, not in the working directory: a built Bento starts from anywhere.
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "default.onnx"

ProviderName = Literal["cpu", "openvino", "cuda", "tensorrt"]
Provider = Literal["auto", ProviderName]


class Settings(BaseModel):
    """One field per variable; the field `max_rows` is the variable `SERVING_MAX_ROWS`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path = Field(BUNDLED_MODEL, description="The ONNX model file.")
    provider: Provider = Field(
        "auto",
        description="auto (CUDA where it works, else the faster of OpenVINO and the CPU provider), "
        "or the name of one.",
    )
    watch_model: bool = Field(
        True, description="Whether a new file in the model file's place takes over while serving."
    )
    workers: PositiveInt = Field(1, description="Processes that serve.")
    threads: int = Field(
        # The cores of the CPU affinity (taskset), or of the cgroup's quota (a container's) if fewer.
        default_factory=loky.cpu_count,
        ge=1,
        le=1024,
        description="Threads of the engine on the CPU, shared by two runs at a time under load, and "
        "threads that decode images.",
    )
    max_batch_size: int = Field(
        64,
        ge=1,
        le=4096,  # images in one run that take gigabytes
        description="Most images in the engine at a time; single images go into it by 8 for each of a "
        "CPU's threads, as more are no faster.",
    )
    max_waiting: PositiveInt = Field(
        512,
        description="Requests of a worker that have arrived and wait for their answers before new ones "
        "get 503.",
    )
    max_connections: PositiveInt = Field(
        1024,
        validate_default=True,
        description="Open connections of a worker before those are closed that have been waited for "
        "longest.",
    )
    max_body_bytes: PositiveInt = Field(64 * 2**20, description="Bytes of a request body.")
    max_upload_bytes: PositiveInt = Field(
        512 * 2**20,
        validate_default=True,
        description="Bytes of all bodies under way in a worker, but the first 64 KiB of each, before "
        "more get 503.",
    )
    max_image_pixels: PositiveInt = Field(50_000_000, description="Width times height of an image.")
    max_batch_images: PositiveInt = Field(256, description="Images of a /classify_batch request.")
    max_rows: PositiveInt = Field(20_000, description="Images of a submission pickle.")
    request_timeout: PositiveFloat = Field(
        300, description="Seconds until a request is given up with 504."
    )
    body_timeout: PositiveFloat = Field(
        60,
        description="Seconds in which a request's body must have arrived, else 408, and in which a "
        "client must take its answer, else it is hung up on.",
    )
    head_timeout: PositiveFloat = Field(
        10, description="Seconds in which a request's headers must have arrived, else it is hung up on."
    )
    stop_timeout: PositiveFloat = Field(
        25, description="Seconds in which requests under way may finish when the service is stopped."
    )
    api_key: SecretStr | None = Field(
        None, min_length=1, description="The key that requests must bring; without it anybody may ask."
    )
    tracing: float = Field(
        0,
        ge=0,
        le=1,
        description="Share of the requests, from 0 to 1, that have spans (OpenTelemetry).",
    )
    access_log: bool = Field(False, description="Log a line of JSON per request.")

    @field_validator("api_key")
    @classmethod
    def _is_text(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            (value or SecretStr("")).get_secret_value().encode()
        except UnicodeEncodeError:
            raise ValueError("it is not UTF-8") from None
        return value

    @field_validator("max_connections")
    @classmethod
    def _leaves_one(cls, value: int, info: ValidationInfo) -> int:
        waiting = info.data.get("max_waiting", 0)
        if value <= waiting:
            raise ValueError(
                f"{waiting} requests may wait ({PREFIX}MAX_WAITING), each on a connection; right would "
                "be more than that"
            )
        return value

    @field_validator("max_upload_bytes")
    @classmethod
    def _holds_a_body(cls, value: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_body_bytes", 0)
        if value < largest:
            raise ValueError(f"a single body may have {largest} bytes ({PREFIX}MAX_BODY_BYTES)")
        return value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read every `SERVING_*` variable; around its value, as from a file, white space is dropped.

        Raises:
            SettingsError: a variable is unknown (a typo must not pass silently) or unusable.
        """
        values = {
            name.removeprefix(PREFIX).lower(): value.strip()
            for name, value in environment.items()
            if name.startswith(PREFIX) and not SERVICE_LINK.match(f"{name}={value}")
        }
        # So is a variable that another one was to fill; without a key, say, everybody would be let in.
        if empty := [PREFIX + name.upper() for name, value in values.items() if not value]:
            raise SettingsError(f"{', '.join(empty)}: there is no value; unset it for the default.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            known = ", ".join(PREFIX + name.upper() for name in cls.model_fields)
            lines = []
            for item in error.errors():
                name = PREFIX + str(item["loc"][0]).upper()
                what = item["msg"].removeprefix("Value error, ")
                if item["type"] == "extra_forbidden":
                    lines.append(f"{name} is not a setting; the settings are {known}.")
                elif name == f"{PREFIX}API_KEY":  # which is not for the log
                    lines.append(f"{name}: {what}.")
                else:
                    lines.append(f"{name}={item['input']!r}: {what}.")
            raise SettingsError("\n".join(lines)) from None
