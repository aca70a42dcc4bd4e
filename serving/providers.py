"""Providers: which of them can run here, and what the others lack.

They are ONNX Runtime's execution providers and OpenVINO, which is a runtime of its own. CUDA's and
TensorRT's are in onnxruntime-gpu, their libraries in NVIDIA's packages.
"""

import ctypes
import importlib.util

import onnxruntime as ort

from serving.settings import ProviderName

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINO"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
FULL_NAMES: dict[ProviderName, str] = {
    "cpu": CPU,
    "openvino": OPENVINO,
    "cuda": CUDA,
    "tensorrt": TENSORRT,
}

COMMANDS: dict[ProviderName, str] = {
    "openvino": "pip install openvino",
    "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13<11'",
}


def obstacle(provider: ProviderName) -> str | None:
    """Return why a provider cannot run here and the command that helps, or None if it is worth a try.

    To ask first keeps ONNX Runtime's errors out of the log.
    """
    match provider:
        case "openvino":
            if importlib.util.find_spec("openvino") is None:
                return f"OpenVINO is not installed; `{COMMANDS[provider]}`"
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
