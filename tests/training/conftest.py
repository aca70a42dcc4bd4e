"""Short real runs on the bundled sample."""

from functools import partial
from pathlib import Path

import pytest

from tests.training.runs import SGD
from training import data, recipe, results
from training.__main__ import main


@pytest.fixture(scope="package")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with A1's network and augmentation that learns in three epochs of eight steps of SGD."""
    path = tmp_path_factory.mktemp("recipe") / "short.toml"
    path.write_text(recipe.load("A1", ["epochs=3", "batch_size=64", SGD]).to_toml())
    return path


@pytest.fixture(scope="package")
def uninterrupted(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``short`` with seed 7, to be read or copied.

    Its row, if it had one, would be in ``results.csv`` beside it.
    """
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
        patch.setattr(results, "record", partial(results.record, path=folder.with_name("results.csv")))
        assert main(["run", str(short), "--out", str(folder), "--seed", "7"]) == 0
    return folder
