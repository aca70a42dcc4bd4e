from collections.abc import Callable
from pathlib import Path

import pytest

from training import data, recipe
from training.__main__ import main

Train = Callable[[str], Path]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a few steps on the bundled sample; gives the checkpoint, made once.

    ``fast`` is a complete run, with a test accuracy; the others are trials.
    """
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            arguments = [name, "--epochs", "1", "--limit", "40", "--set", "batch_size=20"]
            if name == "fast":
                path = out / "fast.toml"
                path.write_text(recipe.load("fast", ["epochs=1", "batch_size=250"]).to_toml())
                arguments = [str(path)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
                assert main(["run", *arguments, "--out", str(out)]) == 0
            made[name] = out / "checkpoint.pt"
        return made[name]

    return checkpoint
