import pytest
import torch

from tests.compiler import needs_a_compiler
from training import device


def test_no_more_threads_than_the_quota_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # acts like a container's quota
    try:
        device.prepare(torch.device("cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_half_precision_is_what_a_gpu_multiplies_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, native = torch.device("cuda"), True
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert device.precision("bf16", gpu) == torch.bfloat16
    assert device.precision("fp16", gpu) == torch.float16
    assert device.precision("off", gpu) == torch.float32
    native = False
    assert device.precision("bf16", gpu) == torch.float16


@needs_a_compiler
def test_steps_are_compiled_on_a_gpu_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert device.compiles(gpu)
    assert not device.compiles(torch.device("cpu"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not device.compiles(gpu)
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert not device.compiles(gpu)
