"""Execution providers: which of them can run here, what the others lack, and a session with each.

OpenVINO's is a plug-in: a library of the package onnxruntime-ep-openvino, which the installed
onnxruntime loads. CUDA's and TensorRT's are in onnxruntime-gpu, their libraries in packages of NVIDIA's.
"""

import ctypes
import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.errors import NoProviderError, ProviderError
from serving.settings import ProviderName

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
FULL_NAMES: dict[ProviderName, str] = {
    "cpu": CPU,
    "openvino": OPENVINO,
    "cuda": CUDA,
    "tensorrt": TENSORRT,
}
SHORT_NAMES = {full: short for short, full in FULL_NAMES.items()}

COMMANDS: dict[ProviderName, str] = {
    "openvino": "pip install onnxruntime-ep-openvino",
    "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13<11'",
}

CUDA_OPTIONS = {
    # The default, EXHAUSTIVE, times every algorithm anew for each batch size that turns up.
    "cudnn_conv_algo_search": "HEURISTIC",
    # The default doubles what the arena has each time that it is too small.
    "arena_extend_strategy": "kSameAsRequested",
    # Channels last, as tensor cores take them: 1.4 times the images/s of the bundled network on an H200
    # (benchmarks/results/cuda-layout.json).
    "prefer_nhwc": "1",
}

ORT_ERRORS_ONLY = 3


def session_options() -> ort.SessionOptions:
    """Options without ONNX Runtime's warnings; without a GPU its search for one would be such."""
    options = ort.SessionOptions()
    options.log_severity_level = ORT_ERRORS_ONLY
    return options


def open_session(
    model: Path | bytes, provider: ProviderName, threads: int, runs: int = 1
) -> ort.InferenceSession:
    """A session that has run a model file on a provider.

    Args:
        model: the file, or its bytes.
        provider: that runs it.
        threads: of the session, where it runs on the CPU.
        runs: at a time that share the threads; as many as it has at most.

    Raises:
        NoProviderError: the provider is not here; the message has the command that helps.
        ProviderError: it does not run the model.
    """
    lack = obstacle(provider)
    if lack:
        raise NoProviderError(f"{lack}.")
    options = session_options()
    options.intra_op_num_threads = threads - runs + 1  # whoever calls for a run is one of them
    options.inter_op_num_threads = 1
    # Threads that spin while they wait would take the cores from the HTTP server.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Patterns are cached for each batch size, and batch sizes vary.
    options.enable_mem_pattern = False
    try:
        chain = _chain(options, provider, threads, runs)
        session = ort.InferenceSession(model, options, providers=chain)
        session.run(["logits"], {"images": np.zeros((1, 32, 32, 3), np.uint8)})
    except Exception as error:
        raise ProviderError(f"{FULL_NAMES[provider]} does not run the model: {error}") from error
    # onnxruntime falls back to the CPU without an error.
    if session.get_providers()[0] != FULL_NAMES[provider]:
        raise NoProviderError(
            f"{FULL_NAMES[provider]} does not start, though a GPU is here; `{COMMANDS[provider]}`."
        )
    return session


def obstacle(provider: ProviderName) -> str | None:
    """Why a provider need not be tried, and the command that helps; asking first keeps the log clean."""
    match provider:
        case "openvino":
            if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
                return (
                    "The OpenVINO plug-in is not installed; "
                    f"`{COMMANDS[provider]}` (there is a wheel for x86-64 Linux)"
                )
            try:
                processor = _openvino_cpu()
            except Exception:
                return None  # a plug-in that is damaged: whoever opens a session is told how
            if processor is None:
                return "The OpenVINO plug-in takes no processor of this machine; it takes Intel's"
        case "cuda" | "tensorrt":
            if FULL_NAMES[provider] not in ort.get_available_providers():
                return (
                    f"The installed onnxruntime has no {FULL_NAMES[provider]}; "
                    f"`{COMMANDS[provider]}` in its place"
                )
            if _gpu_count() == 0:
                return (
                    f"{FULL_NAMES[provider]} cannot be used: there is no NVIDIA driver with a GPU "
                    f"(where there is one, `{COMMANDS[provider]}`)"
                )
            if provider == "tensorrt" and not _has_tensorrt():
                return f"TensorRT's libraries are not installed; `{COMMANDS[provider]}`"
    return None


def _has_tensorrt() -> bool:
    """Whether its libraries are here, by NVIDIA's packages for pip or the system's."""
    if importlib.util.find_spec("tensorrt_libs") is not None:
        return True
    try:
        ctypes.CDLL("libnvinfer.so.10")
    except OSError:
        return False
    return True


def _chain(
    options: ort.SessionOptions, provider: ProviderName, threads: int, runs: int
) -> list[Any] | None:
    """The providers in the order in which nodes are offered; None where the options have them."""
    match provider:
        case "openvino":
            processor = _openvino_cpu()
            assert processor is not None  # else there was an obstacle
            options.add_provider_for_devices([processor], _openvino_options(threads, runs))
            return None
        case "cuda" | "tensorrt":
            # The libraries of NVIDIA's packages lie in site-packages, where no loader looks.
            ort.preload_dlls()
            if provider == "tensorrt" and importlib.util.find_spec("tensorrt_libs"):
                importlib.import_module("tensorrt_libs")
            gpu: list[Any] = [TENSORRT] if provider == "tensorrt" else []
            return [*gpu, (CUDA, CUDA_OPTIONS), CPU]
    return [CPU]


@functools.cache
def _openvino_cpu() -> ort.OrtEpDevice | None:
    """OpenVINO's CPU device, or None where it takes none, such as AMD's; loads the plug-in."""
    plugin = importlib.import_module("onnxruntime_ep_openvino")
    ort.register_execution_provider_library(OPENVINO, plugin.get_library_path())
    for device in ort.get_ep_devices():
        if device.ep_name == OPENVINO and device.ep_metadata.get("ov_device") == "CPU":
            return device
    return None


def _openvino_options(threads: int, runs: int) -> dict[str, str]:
    properties = {
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": str(runs),
        # Threads that are bound to cores meet those of other workers on the same ones.
        "ENABLE_CPU_PINNING": "NO",
    }
    return {"load_config": json.dumps({"CPU": properties})}


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
