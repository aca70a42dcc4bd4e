from collections.abc import Callable
from pathlib import Path

import pytest

from training import data
from training.__main__ import main

Train = Callable[[str], Path]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a recipe for a few steps on the bundled sample; gives its checkpoint, made once."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            limits = ["--epochs", "1", "--limit", "40", "--set", "batch_size=20"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
                assert main(["run", name, "--out", str(out), *limits]) == 0
            made[name] = out / "checkpoint.pt"
        return made[name]

    return checkpoint
