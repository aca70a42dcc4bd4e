"""Short real runs on the bundled sample."""

import json
from pathlib import Path

import pytest
from typing_extensions import override

from training import data, recipe
from training.__main__ import main
from training.watch import Watch

SGD = "optimizer={kind='sgd', lr=0.05, momentum=0.9, nesterov=false, weight_decay=0.0}"


def selection(model: str, share: float) -> str:
    """The override that lets the network of the recipe ``model`` select, and learn by SGD."""
    network = ", ".join(f"{key}={json.dumps(value)}" for key, value in recipe.load(model).model)
    return f"selection={{share={share}, model={{{network}}}, {SGD}}}"


class Limited(Watch):
    """Has a reason to stop, as by a signal, once it was asked so many ``times``."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    @override
    def reason(self, needed: float) -> int:
        self.left -= 1
        return 15 * (self.left < 0)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of A1's network and augmentation: three epochs of eight steps of SGD that learn."""
    path = tmp_path_factory.mktemp("recipe") / "short.toml"
    path.write_text(recipe.load("A1", ["epochs=3", "batch_size=64", SGD]).to_toml())
    return path


@pytest.fixture(scope="module")
def uninterrupted(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``short`` with seed 7."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
        assert main(["run", str(short), "--out", str(folder), "--seed", "7"]) == 0
    return folder
