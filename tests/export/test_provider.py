from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import serving.providers
import serving.sessions
from export.provider import CPU, others
from serving.errors import ProviderError
from serving.providers import CUDA, OPENVINO, obstacle
from training import data


def test_others_run_the_file_too_where_there_are_any(files: dict[str, Path]) -> None:
    content, pixels = files["fp32"].read_bytes(), data.load_sample().test.pixels[:50].numpy()
    found = list(others(content))
    assert CPU not in found
    assert (OPENVINO in {other.name for other in found}) == (obstacle("openvino") is None)
    expected = CPU.logits(content, pixels)
    for provider in found:
        actual = provider.logits(content, pixels)
        assert (actual.argmax(1) == expected.argmax(1)).mean() > 0.95
        assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA provider"
)
def test_a_gpu_that_cannot_run_the_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.providers, "_gpu_count", lambda: 1)
    monkeypatch.setattr(serving.sessions, "obstacle", lambda name: None if name == "cuda" else "No")
    with pytest.raises(ProviderError, match=f"{CUDA} does not run the model"):
        list(others(b"nonsense"))


def test_a_gpu_without_its_libraries_is_none(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle("cuda") is None:
        pytest.skip("CUDA may work here")
    monkeypatch.setattr(serving.providers, "_gpu_count", lambda: 1)
    assert CUDA not in {other.name for other in others(files["fp32"].read_bytes())}


@pytest.mark.parametrize("content", [b"nonsense", b""])
def test_what_is_not_a_model_is_an_error_that_names_the_provider(content: bytes) -> None:
    with pytest.raises(ProviderError, match="CPUExecutionProvider does not run the model: "):
        CPU.logits(content, np.zeros((1, 32, 32, 3), np.uint8))
