from pathlib import Path

import numpy as np
import pytest
import torch

from export.provider import CPU, ProviderError, others
from training import data


def test_others_run_the_file_too_where_there_are_any(files: dict[str, Path]) -> None:
    content, pixels = files["fp32"].read_bytes(), data.load_sample().test.pixels[:50].numpy()
    found = others(content)
    assert CPU not in found
    if not torch.cuda.is_available():
        assert found == []
    for provider in found:
        assert provider.session(content).get_providers()[0] == provider.name
        agreement = provider.logits(content, pixels).argmax(1) == CPU.logits(content, pixels).argmax(1)
        assert agreement.mean() > 0.95


def test_what_is_not_a_model_is_an_error_that_names_the_provider() -> None:
    with pytest.raises(ProviderError, match="CPUExecutionProvider cannot run the model: "):
        CPU.logits(b"nonsense", np.zeros((1, 32, 32, 3), np.uint8))
