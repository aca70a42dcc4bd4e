"""The model file: one ONNX graph with its description, loaded into an inference session."""

import ctypes
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from serving.errors import ModelError, ProviderError
from serving.settings import Provider

logger = logging.getLogger("serving")

CONTRACT = "1"
REQUIRED = ("contract", "name", "version", "classes", "precision")
# Texts that may look like numbers: a version of twelve hex digits can be 123456789012 or 12e456.
TEXTS = frozenset({"name", "version", "precision", "commit", "checkpoint_sha256", "recipe"})

ORT_ERRORS_ONLY = 3
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# The default, EXHAUSTIVE, times every algorithm anew for each batch size that turns up.
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC"}


class Model:
    """A model file in a session that is safe to call from any thread.

    The file keeps contract 1: input `images` uint8 [N, 32, 32, 3] RGB, output `logits` float32
    [N, classes], and metadata with at least contract, name, version, classes and precision.

    Attributes:
        metadata: everything the file says of itself, JSON values decoded.
        name, version: identify the model in every answer.
        classes: label of each index.
        provider: the execution provider that really runs it.
    """

    def __init__(self, path: Path, provider: Provider, threads: int) -> None:
        """Load and check the file, then run it once.

        Raises:
            ModelError: the file is missing, is not ONNX or does not keep the contract.
            ProviderError: `provider` is "cuda" and CUDA cannot be used here.
        """
        if not path.is_file():
            raise ModelError(
                f"There is no model file at {path}; set SERVING_MODEL to an ONNX file "
                "written by `python -m export write`."
            )
        self._session = _session(path, provider, threads)
        self.provider: str = self._session.get_providers()[0]
        self.metadata = _metadata(path, self._session)
        self.name: str = self.metadata["name"]
        self.version: str = self.metadata["version"]
        self.classes: tuple[str, ...] = tuple(self.metadata["classes"])
        _check_signature(path, self._session, len(self.classes))
        self._warm_up(path)

    def logits(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits float32 [N, classes] of images uint8 [N, 32, 32, 3] RGB."""
        batch = np.ascontiguousarray(images)
        result: npt.NDArray[np.float32] = self._session.run(["logits"], {"images": batch})[0]
        return result

    def _warm_up(self, path: Path) -> None:
        """Two batch sizes, so that a graph whose batch is fixed is found now and not under load."""
        for count in (1, 2):
            try:
                shape = self.logits(np.zeros((count, 32, 32, 3), np.uint8)).shape
            except Exception as error:
                raise ModelError(f"{path} does not run on a batch of {count}: {error}") from error
            if shape != (count, len(self.classes)):
                raise ModelError(
                    f"{path} gives logits {list(shape)} for {count} images; "
                    f"right would be {[count, len(self.classes)]}."
                )


def _session(path: Path, provider: Provider, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait would take the cores from the HTTP server.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Patterns are cached for each batch size, and batch sizes vary.
    options.enable_mem_pattern = False
    options.log_severity_level = ORT_ERRORS_ONLY

    obstacle = _cuda_obstacle()
    if provider == "cuda" and obstacle:
        raise ProviderError(f"{obstacle}; or set SERVING_PROVIDER=cpu.")
    providers: list[Any] = [CPU]
    if provider != "cpu" and not obstacle:
        # The CUDA libraries of the onnxruntime-gpu[cuda,cudnn] extras lie in site-packages.
        ort.preload_dlls()
        providers.insert(0, (CUDA, CUDA_OPTIONS))
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:
        raise ModelError(f"{path} is not an ONNX model that can be loaded: {error}") from error
    # onnxruntime falls back to the CPU without an error; asked by name, that is not good enough.
    if len(providers) > 1 and session.get_providers()[0] != CUDA:
        reason = "A GPU is here but CUDA does not start; `pip install onnxruntime-gpu[cuda,cudnn]`"
        if provider == "cuda":
            raise ProviderError(f"{reason}, or set SERVING_PROVIDER=cpu.")
        logger.warning("%s to use it. Going on with the CPU.", reason)
    return session


def _cuda_obstacle() -> str | None:
    """Why CUDA need not be tried, and what would help; asking first keeps the log clean."""
    if CUDA not in ort.get_available_providers():
        return (
            "The installed onnxruntime has no CUDA provider; "
            "`pip install onnxruntime-gpu[cuda,cudnn]` in its place"
        )
    if _gpu_count() == 0:
        return "CUDA cannot be used: there is no NVIDIA driver with a GPU"
    return None


def _gpu_count() -> int:
    """GPUs that the driver shows."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


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
    try:
        return json.loads(value)
    except ValueError:
        return value


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
