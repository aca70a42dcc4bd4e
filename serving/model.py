"""The model file: one ONNX graph with its metadata, checked and loaded into an engine."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from serving.engine import Engine
from serving.errors import ModelError, StartError
from serving.providers import CPU
from serving.sessions import session_options
from serving.settings import Provider
from serving.version import version

CONTRACT = "1"
REQUIRED = ("contract", "name", "version", "classes", "precision")
# Texts that may look like numbers: a version of twelve hex digits can be 123456789012 or 1234567890e1.
TEXTS = frozenset({"name", "version", "precision", "commit", "checkpoint_sha256", "recipe"})
DOMAINS = ("", "ai.onnx")


class Model:
    """A model file in an engine that is safe to call from any thread.

    The file keeps contract 1: input `images` uint8 [N, 32, 32, 3] RGB, output `logits` float32
    [N, classes], operators of ONNX's own domain, and metadata with at least contract, name, version (as
    `serving.version` computes it), classes and precision.

    Attributes:
        metadata: everything the file says about itself, with JSON values decoded.
        name, version: identify the model in every answer.
        classes: label of each index.
        provider: the execution provider that really runs it; `provider_reason` says why that one.
        runs: how many calls of `logits` at a time make full use of the device.
        chunk_size: most images in one call, so that all calls together have up to `max_batch_size`.
        batch_size: single images in one call, up to `chunk_size`, that make full use of the device: with
            more, the answers would only come later.
    """

    def __init__(
        self,
        path: Path,
        provider: Provider,
        threads: int,
        *,
        runs: int = 1,
        max_batch_size: int = 1,
        choices: Path | None = None,
    ) -> None:
        """Load and check the file, then run it.

        Args:
            path: the file.
            provider: as for `serving.engine.Engine`, like `threads` and `runs`.
            max_batch_size: most images that will be in the engine at a time.
            choices: a folder in which processes that share it agree on what the provider "auto" means.

        Raises:
            ModelError: the file is missing, is not ONNX, does not keep the contract or is damaged.
            ProviderError: `provider` is a provider's name and it cannot be used here.
        """
        try:
            content = _read(path)
            opened = _opened(path, content)
            _check_operators(path, opened)
            self.metadata = _metadata(path, opened)
            self.name: str = self.metadata["name"]
            self.version: str = self.metadata["version"]
            self.classes: tuple[str, ...] = tuple(self.metadata["classes"])
            _check_signature(path, opened, len(self.classes))
            _check_version(path, content, self.version)
            _check_runs(path, opened, len(self.classes))
            choice = choices / f"provider-{self.version}" if choices else None
            self._engine = Engine(path, provider, threads, min(runs, max_batch_size), choice)
            self.provider, self.provider_reason = self._engine.provider, self._engine.reason
            self.runs = self._engine.runs
            self.chunk_size = max_batch_size // self.runs
            self.batch_size = min(self.chunk_size, self._engine.enough or self.chunk_size)
            self._engine.warm_up(self.batch_size)
        except StartError:
            raise
        except OSError as error:  # such as that of a folder that may not be entered
            raise ModelError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # whatever damage raises: text that is not UTF-8, JSON too deep
            raise ModelError(f"{path} cannot be used: {error}") from error

    def logits(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, float32 [N, classes], of RGB images, uint8 [N, 32, 32, 3].

        Raises:
            ModelError: the logits have another shape.
            FloatingPointError: the logits are not finite, so no class is the most probable.
        """
        logits = self._engine.run(images)
        if logits.shape != (len(images), len(self.classes)):
            raise ModelError(
                f"{self.name} {self.version} gave logits {list(logits.shape)} for {len(images)} images"
            )
        if not np.isfinite(logits).all():
            raise FloatingPointError(
                f"{self.name} {self.version} gave logits that are no finite numbers"
            )
        return logits


def _read(path: Path) -> bytes:
    if not path.is_file():
        lack = f"{path} is no file" if path.exists() else f"There is no model file at {path}"
        raise ModelError(
            f"{lack}; right would be an ONNX file that `python -m export write` has written."
        )
    return path.read_bytes()


def _opened(path: Path, content: bytes) -> ort.InferenceSession:
    """Open the file for checks, without optimisation, so that its own operators are listed.

    It is opened from its bytes, so that it has to be complete in itself: a copy of it would lack weights
    that lie in other files.
    """
    options = session_options()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Otherwise weights would be looked for in the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        return ort.InferenceSession(content, options, providers=[CPU])
    except Exception as error:
        raise ModelError(
            f"{path} is not an ONNX model that can be loaded (`python -m export write` makes one of a "
            f"checkpoint): {error}"
        ) from error


def _check_operators(path: Path, session: ort.InferenceSession) -> None:
    nodes = [node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    foreign = sorted({f"{node.domain}:{node.op_type}" for node in nodes if node.domain not in DOMAINS})
    if foreign:
        raise ModelError(
            f"{path} has the operators {', '.join(foreign)}, which only some providers know; "
            "right would be operators of ONNX's own domain, as `python -m export` writes them."
        )


def _metadata(path: Path, session: ort.InferenceSession) -> dict[str, Any]:
    raw: dict[str, str] = session.get_modelmeta().custom_metadata_map
    missing = [key for key in REQUIRED if not raw.get(key)]
    if missing:
        raise ModelError(
            f"{path} lacks the metadata {', '.join(missing)}; a model file of contract {CONTRACT} "
            f"has {', '.join(REQUIRED)}, as `python -m export write` writes them."
        )
    if raw["contract"] != CONTRACT:
        raise ModelError(
            f"{path} keeps contract {raw['contract']!r}; this service reads contract {CONTRACT}."
        )
    metadata = {key: value if key in TEXTS else _decoded(value) for key, value in sorted(raw.items())}
    classes = metadata["classes"]
    if not (
        isinstance(classes, list)
        and classes
        and all(isinstance(label, str) and label for label in classes)
        and len(set(classes)) == len(classes)
    ):
        raise ModelError(f"{path}: the metadata classes must be a JSON list of different names.")
    return metadata


def _decoded(value: str) -> Any:
    """Decode a text that is JSON, if its value can be sent as JSON again; return any other as it is."""
    try:
        decoded = json.loads(value)
        json.dumps(decoded, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:  # not JSON; or NaN, infinity, or half a surrogate pair
        return value
    return decoded


def _check_signature(path: Path, session: ort.InferenceSession, classes: int) -> None:
    inputs = [(node.name, node.type, node.shape) for node in session.get_inputs()]
    outputs = [(node.name, node.type, node.shape) for node in session.get_outputs()]
    name, kind, shape = inputs[0] if len(inputs) == 1 else ("", "", [])
    if (name, kind) != ("images", "tensor(uint8)") or shape[1:] != [32, 32, 3]:
        raise ModelError(
            f"{path} takes {inputs}; right would be one input, images uint8 [N, 32, 32, 3]."
        )
    if isinstance(shape[0], int):
        raise ModelError(f"{path} takes batches of {shape[0]} only; the batch must be dynamic.")
    name, kind, shape = outputs[0] if len(outputs) == 1 else ("", "", [])
    if (name, kind) != ("logits", "tensor(float)") or shape[1:] != [classes]:
        raise ModelError(
            f"{path} gives {outputs}; right would be one output, logits float32 [N, {classes}]."
        )


def _check_version(path: Path, content: bytes, claimed: str) -> None:
    if (found := version(content)) != claimed:
        raise ModelError(
            f"{path} says that it is version {claimed}, but its graph is {found}: it was changed or "
            "damaged after `python -m export write` had written it."
        )


def _check_runs(path: Path, session: ort.InferenceSession, classes: int) -> None:
    """Run two batch sizes, so that a graph whose batch is fixed is found now and not under load."""
    for count in (1, 2):
        try:
            logits = session.run(["logits"], {"images": np.zeros((count, 32, 32, 3), np.uint8)})[0]
        except Exception as error:
            raise ModelError(f"{path} does not run on a batch of {count}: {error}") from error
        if logits.shape != (count, classes):
            raise ModelError(
                f"{path} gives logits {list(logits.shape)} for {count} images; "
                f"right would be {[count, classes]}."
            )
        if not np.isfinite(logits).all():
            raise ModelError(f"{path} gives logits that are no finite numbers; it is damaged.")
