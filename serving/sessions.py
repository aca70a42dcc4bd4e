"""Sessions: a model file that is ready to run on a provider."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from serving.errors import NoProviderError, ProviderError
from serving.openvino import OpenVINOSession
from serving.providers import COMMANDS, CPU, CUDA, FULL_NAMES, TENSORRT, obstacle
from serving.settings import ProviderName

CUDA_OPTIONS = {
    # The default, EXHAUSTIVE, times every algorithm again for each new batch size.
    "cudnn_conv_algo_search": "HEURISTIC",
    # The default doubles the arena each time that it is too small.
    "arena_extend_strategy": "kSameAsRequested",
    # Channels last, as tensor cores take them: 1.4 times the images/s of the bundled network on an H200
    # (benchmarks/results/cuda-layout.json).
    "prefer_nhwc": "1",
}

ORT_ERRORS_ONLY = 3


class Session(Protocol):
    """A model file that is ready to run; safe to call from any thread."""

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, float32 [N, classes], of RGB images, uint8 [N, 32, 32, 3], C-contiguous."""


class OnnxRuntimeSession:
    """A session of ONNX Runtime.

    Attributes:
        session: ONNX Runtime's own.
    """

    def __init__(self, model: Path | bytes, provider: ProviderName, threads: int, runs: int = 1) -> None:
        """Open a session; arguments are as for `open_session`.

        Raises:
            NoProviderError: the provider does not start.
            Exception: ONNX Runtime has a dozen kinds of its own, if it does not take the model.
        """
        options = session_options()
        options.intra_op_num_threads = threads - runs + 1  # each run's calling thread works too
        options.inter_op_num_threads = 1
        # Threads that spin while they wait would take the cores from the HTTP server.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A pattern is cached for each batch size, and batch sizes vary.
        options.enable_mem_pattern = False
        self.session = ort.InferenceSession(model, options, providers=_chain(provider))
        # onnxruntime falls back to the CPU without raising an error.
        if self.session.get_providers()[0] != FULL_NAMES[provider]:
            raise NoProviderError(
                f"{FULL_NAMES[provider]} does not start, though a GPU is here; `{COMMANDS[provider]}`."
            )

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits as `Session.run` does.

        Raises:
            Exception: one of ONNX Runtime's; its InvalidArgument for images of another size.
        """
        logits: npt.NDArray[np.float32] = self.session.run(["logits"], {"images": images})[0]
        return logits


def open_session(model: Path | bytes, provider: ProviderName, threads: int, runs: int = 1) -> Session:
    """Open a session with a model file on a provider, and run it once.

    Args:
        model: the file, or its bytes.
        provider: the provider that is to run it.
        threads: how many threads the session uses, if it runs on the CPU.
        runs: how many runs at a time share the threads; at most `threads`.

    Raises:
        NoProviderError: the provider cannot start here; the message has the command that helps.
        ProviderError: it does not run the model.
    """
    lack = obstacle(provider)
    if lack:
        raise NoProviderError(f"{lack}.")
    try:
        session: Session
        if provider == "openvino":
            session = OpenVINOSession(model, threads, runs)
        else:
            session = OnnxRuntimeSession(model, provider, threads, runs)
        session.run(np.zeros((1, 32, 32, 3), np.uint8))
    except NoProviderError:
        raise
    except Exception as error:
        raise ProviderError(f"{FULL_NAMES[provider]} does not run the model: {error}") from error
    return session


def session_options() -> ort.SessionOptions:
    """Return options that log errors only; without a GPU, ONNX Runtime warns of its search for one."""
    options = ort.SessionOptions()
    options.log_severity_level = ORT_ERRORS_ONLY
    return options


def _chain(provider: ProviderName) -> list[Any]:
    """Return ONNX Runtime's providers in the order in which nodes are offered to them."""
    if provider == "cpu":
        return [CPU]
    # The libraries of NVIDIA's packages lie in site-packages, where the loader does not look.
    ort.preload_dlls()
    if provider == "tensorrt" and importlib.util.find_spec("tensorrt_libs"):
        importlib.import_module("tensorrt_libs")
    gpu: list[Any] = [TENSORRT] if provider == "tensorrt" else []
    return [*gpu, (CUDA, CUDA_OPTIONS), CPU]
