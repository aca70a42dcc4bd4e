"""Execution providers: which of them can run here, what the others lack, and sessions with them.

OpenVINO's is a plug-in: a library in the package onnxruntime-ep-openvino, which the installed
onnxruntime loads. CUDA's and TensorRT's are in onnxruntime-gpu, their libraries in NVIDIA's packages.
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
    # The default, EXHAUSTIVE, times every algorithm again for each new batch size.
    "cudnn_conv_algo_search": "HEURISTIC",
    # The default doubles the arena each time that it is too small.
    "arena_extend_strategy": "kSameAsRequested",
    # Channels last, as tensor cores take them: 1.4 times the images/s of the bundled network on an H200
    # (benchmarks/results/cuda-layout.json).
    "prefer_nhwc": "1",
}

ORT_ERRORS_ONLY = 3


def session_options() -> ort.SessionOptions:
    """Return options that log errors only; without a GPU, ONNX Runtime warns of its search for one."""
    options = ort.SessionOptions()
    options.log_severity_level = ORT_ERRORS_ONLY
    return options


def open_session(
    model: Path | bytes, provider: ProviderName, threads: int, runs: int = 1
) -> ort.InferenceSession:
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
    options = session_options()
    options.intra_op_num_threads = threads - runs + 1  # each run's calling thread works too
    options.inter_op_num_threads = 1
    # Threads that spin while they wait would take the cores from the HTTP server.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A pattern is cached for each batch size, and batch sizes vary.
    options.enable_mem_pattern = False
    try:
        chain = _chain(options, provider, threads, runs)
        session = ort.InferenceSession(model, options, providers=chain)
        session.run(["logits"], {"images": np.zeros((1, 32, 32, 3), np.uint8)})
    except Exception as error:
        raise ProviderError(f"{FULL_NAMES[provider]} does not run the model: {error}") from error
    # onnxruntime falls back to the CPU without raising an error.
    if session.get_providers()[0] != FULL_NAMES[provider]:
        raise NoProviderError(
            f"{FULL_NAMES[provider]} does not start, though a GPU is here; `{COMMANDS[provider]}`."
        )
    return session


def obstacle(provider: ProviderName) -> str | None:
    """Return why a provider cannot run here and the command that helps, or None if it is worth a try.

    To ask first keeps ONNX Runtime's errors out of the log.
    """
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
                return None  # a damaged plug-in: `open_session` says what is wrong
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
    """Return whether TensorRT's libraries are here, from NVIDIA's packages for pip or the system's."""
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
    """Return the providers in the order in which nodes are offered; None if `options` now has them."""
    match provider:
        case "openvino":
            processor = _openvino_cpu()
            assert processor is not None  # else `obstacle` reports it
            options.add_provider_for_devices([processor], _openvino_options(threads, runs))
            return None
        case "cuda" | "tensorrt":
            # The libraries of NVIDIA's packages lie in site-packages, where the loader does not look.
            ort.preload_dlls()
            if provider == "tensorrt" and importlib.util.find_spec("tensorrt_libs"):
                importlib.import_module("tensorrt_libs")
            gpu: list[Any] = [TENSORRT] if provider == "tensorrt" else []
            return [*gpu, (CUDA, CUDA_OPTIONS), CPU]
    return [CPU]


@functools.cache
def _openvino_cpu() -> ort.OrtEpDevice | None:
    """Load the plug-in; return its CPU device, or None if it takes no processor here, such as AMD's."""
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
        # Threads bound to cores would meet those of other workers on the same cores.
        "ENABLE_CPU_PINNING": "NO",
    }
    return {"load_config": json.dumps({"CPU": properties})}


def _gpu_count() -> int:
    """Return how many GPUs NVIDIA's driver shows; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
