"""The training device: which one, at what precision, and how its memory is handled."""

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import loky
import torch

from training.recipe import Amp


def choose(index: int = 0) -> torch.device:
    """The CUDA GPU with this ``index``, or the CPU if there is no GPU."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def precision(amp: Amp, device: torch.device) -> torch.dtype:
    """The dtype to compute in on ``device`` for a recipe's ``amp``.

    A GPU uses what the recipe says, but fp16 if it would only emulate bf16 (before Ampere). A CPU uses
    bf16 for either half type if it multiplies bf16 natively (AMX or AVX512-BF16), else float32.
    """
    if amp == "off":
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if amp == "bf16" and native else torch.float16
    abilities = torch.cpu.get_capabilities()
    native = abilities.get("amx_bf16") or abilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def rounds_to_tf32(device: torch.device) -> bool:
    """Return whether float32 convolutions on ``device`` multiply in TF32, which is torch's default."""
    if device.type != "cuda" or not torch.backends.cudnn.allow_tf32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def compiles(device: torch.device) -> bool:
    """Return whether steps are compiled on ``device`` by default.

    They are on a GPU, which otherwise waits for the program to launch operations one by one, if the
    tools are installed; but not if runs have to be reproducible, as a compiled step may differ after a
    resumption. On a CPU, compiling takes longer than most runs gain by it.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return device.type == "cuda" and not deterministic and can_compile()


def can_compile() -> bool:
    """Return whether torch can compile here: it needs a C++ compiler and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def describe(device: torch.device) -> str:
    """Describe the device for results: the GPU, if it is one, then the processor and its threads."""
    processor = f"{_processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {processor}"
    return processor


def prepare(device: torch.device) -> None:
    """Set the process up for fast training on ``device``.

    On a CPU with glibc, large activations would be mapped and unmapped in every step, and page faults
    would take much of the time; so freed memory stays in the heap.
    """
    limit_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for nccl, which otherwise uses the first GPU in every process
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.backends.cudnn.benchmark = not deterministic
        return
    if libc := _glibc():
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # M_* of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 * 2**20)


def limit_threads() -> None:
    """Limit torch to as many threads as a container's CPU quota has cores.

    More would only take time from each other.
    """
    torch.set_num_threads(min(torch.get_num_threads(), loky.cpu_count()))


def be_deterministic() -> None:
    """Make a GPU give the same weights for the same seed, at the price of speed; a CPU always does.

    Call it before anything runs on the GPU: cuBLAS reads its setting when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def release_memory(device: torch.device) -> None:
    """Give back freed memory, which torch or the heap would keep for the next step."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif libc := _glibc():
        libc.malloc_trim(0)


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether an operation failed for lack of memory."""
    # From torch's CPU allocator, oneDNN (which then cannot create a primitive), cuBLAS and cuDNN.
    texts = ("can't allocate memory", "could not create a primitive", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        return ctypes.CDLL(None)
    return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
