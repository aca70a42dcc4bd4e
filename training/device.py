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
    """The CUDA GPU of this ``index``, or the CPU where there is none."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def precision(amp: Amp, device: torch.device) -> torch.dtype:
    """The dtype of a recipe's ``amp`` on ``device``.

    A GPU takes what the recipe says, but fp16 where it would only emulate bf16 (before Ampere). A CPU
    takes bf16 for either half type where it multiplies bf16 natively (AMX or AVX512-BF16), else float32.
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
    """Whether float32 convolutions on ``device`` round what they multiply to TF32, torch's default."""
    if device.type != "cuda" or not torch.backends.cudnn.allow_tf32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def compiles(device: torch.device) -> bool:
    """Whether compiled steps are the rule on ``device``.

    On a GPU, whose operations would else wait for the program that starts them one by one, where the
    tools are here; not where runs have to be reproducible, as a compiled step may be another one after a
    resumption. On a CPU what compiling takes is more than most runs gain by it.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return device.type == "cuda" and not deterministic and can_compile()


def can_compile() -> bool:
    """Whether what torch compiles with is here: a C++ compiler, and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def describe(device: torch.device) -> str:
    """The device in words, for results: the processor with its cores, after a GPU that computes."""
    processor = f"{_processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {processor}"
    return processor


def prepare(device: torch.device) -> None:
    """Set the process up for fast training on ``device``.

    On a CPU with glibc large activations would be mapped and unmapped anew in every step, and much of
    the time would go into page faults; so freed memory stays in the heap.
    """
    limit_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for nccl, which else takes the first one in every process
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.backends.cudnn.benchmark = not deterministic
        return
    if libc := _glibc():
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # M_* of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 * 2**20)


def limit_threads() -> None:
    """Have no more threads than a container's quota has cores for.

    They would only take time from each other.
    """
    torch.set_num_threads(min(torch.get_num_threads(), loky.cpu_count()))


def be_deterministic() -> None:
    """Make a GPU give the same weights for the same seed, at the price of speed; a CPU always does.

    Before anything runs on the GPU: cuBLAS reads its setting when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def release_memory(device: torch.device) -> None:
    """Give freed memory back, which torch or the heap keep for the next step."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif libc := _glibc():
        libc.malloc_trim(0)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an operation failed because memory did not suffice."""
    # Torch's allocator on a CPU, oneDNN, which cannot create a primitive then, cuBLAS and cuDNN: texts.
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
