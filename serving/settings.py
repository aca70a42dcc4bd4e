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
# Variables that tell a server's workers which process started them, and where they share their figures
# and the last model file that passed the checks.
SUPERVISOR = "CIFAR10_SUPERVISOR"
METRICS_FOLDER = "CIFAR10_METRICS_FOLDER"
KEPT_MODEL = "CIFAR10_KEPT_MODEL"

# What Kubernetes sets in all pods of a namespace for a Service there, such as one named `serving-api`.
# Recognised by the name, up to the first "=": a key that looks like such a variable is still a key.
SERVICE_LINK = re.compile(
    r"[^=]*(_SERVICE_(HOST|PORT(_\w+)?)=|_PORT(_\d+_(TCP|UDP|SCTP))?=\w+://|_(TCP|UDP|SCTP)_\w+=)"
)

# Found beside the package, not in the working directory: a built Bento can be started from anywhere.
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "default.onnx"

ProviderName = Literal["cpu", "openvino", "cuda", "tensorrt"]
Provider = Literal["auto", ProviderName]


def server_folder() -> Path | None:
    """Return the folder of the server's own files, in its workers; None in any other process."""
    figures = os.environ.get(METRICS_FOLDER)
    return Path(figures).parent if figures else None


class Settings(BaseModel):
    """One field per variable; the field `max_rows` is the variable `SERVING_MAX_ROWS`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path = Field(BUNDLED_MODEL, description="The ONNX model file.")
    provider: Provider = Field(
        "auto",
        description="What runs the model: auto (CUDA where it works, else the faster of OpenVINO and "
        "the CPU provider), cpu, openvino, cuda or tensorrt.",
    )
    watch_model: bool = Field(
        True, description="Whether a new file that replaces the model file takes over while serving."
    )
    workers: PositiveInt = Field(
        1, description="Processes that serve, each with its own model and threads."
    )
    threads: int = Field(
        # The cores in the CPU affinity (taskset), or in the cgroup's quota (a container's) if fewer.
        default_factory=loky.cpu_count,
        ge=1,
        le=1024,
        description="Threads of the engine on the CPU, shared by two runs at a time under load, and "
        "also how many threads decode images.",
    )
    max_batch_size: int = Field(
        64,
        ge=1,
        le=4096,  # so many images in one run take gigabytes
        description="Most images in the engine at a time, on a CPU in two runs; there, a run takes up "
        "to 8 single images per thread, as more are no faster.",
    )
    max_waiting: PositiveInt = Field(
        512,
        description="Most requests of a worker that have arrived and wait for their answers; further "
        "ones get 503.",
    )
    max_connections: PositiveInt = Field(
        1024,
        validate_default=True,
        description="Most open connections of a worker; a further one closes the one that has waited "
        "longest for its client.",
    )
    max_body_bytes: PositiveInt = Field(64 * 2**20, description="Most bytes in a request's body.")
    max_upload_bytes: PositiveInt = Field(
        512 * 2**20,
        validate_default=True,
        description="Most bytes of all bodies under way in a worker, without the first 64 KiB of each; "
        "further ones get 503.",
    )
    max_image_pixels: PositiveInt = Field(
        50_000_000, description="Most pixels of an image, width times height; a quarter of it for WebP."
    )
    max_batch_images: PositiveInt = Field(
        256, description="Most images in a request to /classify_batch or under /v2."
    )
    max_rows: PositiveInt = Field(20_000, description="Most images in a submission's pickle.")
    request_timeout: PositiveFloat = Field(
        300, description="Seconds after which a request is given up and gets 504."
    )
    body_timeout: PositiveFloat = Field(
        60,
        description="Seconds within which a request's body must arrive, else it gets 408, and a client "
        "must take its answer, else its connection is closed.",
    )
    head_timeout: PositiveFloat = Field(
        10,
        description="Seconds within which a request's headers must arrive, else the connection is "
        "closed.",
    )
    stop_timeout: PositiveFloat = Field(
        25, description="Seconds that requests under way have to finish when the service is stopped."
    )
    api_key: SecretStr | None = Field(
        None, min_length=1, description="The key that requests must have; if unset, none is needed."
    )
    tracing: float = Field(
        0,
        ge=0,
        le=1,
        description="Share of requests, from 0 to 1, that have OpenTelemetry spans.",
    )
    access_log: bool = Field(False, description="Whether to log a line of JSON for each request.")

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
        """Read every `SERVING_*` variable; white space around a value, as from a file, is dropped.

        Raises:
            SettingsError: a variable is unknown (a typo must not pass silently) or unusable.
        """
        values = {
            name.removeprefix(PREFIX).lower(): value.strip()
            for name, value in environment.items()
            if name.startswith(PREFIX) and not SERVICE_LINK.match(f"{name}={value}")
        }
        # A variable that is filled from another one may be empty; an empty key would let everybody in.
        empty = [PREFIX + name.upper() for name, value in values.items() if not value]
        lines = [f"{', '.join(empty)}: there is no value; unset it for the default."] if empty else []
        try:
            settings = cls.model_validate({name: value for name, value in values.items() if value})
            if not lines:
                return settings
        except ValidationError as error:
            known = ", ".join(PREFIX + name.upper() for name in cls.model_fields)
            for item in error.errors():
                name = PREFIX + str(item["loc"][0]).upper()
                what = item["msg"].removeprefix("Value error, ")
                if item["type"] == "extra_forbidden":
                    lines.append(f"{name} is not a setting; the settings are {known}.")
                elif name == f"{PREFIX}API_KEY":  # the log must not have its value
                    lines.append(f"{name}: {what}.")
                else:
                    lines.append(f"{name}={item['input']!r}: {what}.")
        raise SettingsError("\n".join(lines))
