import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from training import checkpoint, data, provenance, recipe
from training.checkpoint import Checkpoint, CheckpointError
from training.model import CLASSES, build
from training.processes import Processes
from training.recipe import RecipeError
from training.run import Run


@pytest.fixture
def state() -> Checkpoint:
    loaded = recipe.load("A1")
    return Checkpoint(
        recipe=loaded.model_dump(mode="json", exclude_none=True),
        recipe_name="A1",
        classes=list(CLASSES),
        run={"seed": 0, "limit": None, "complete": False, "data": "sample", "commit": "abc"},
        model=build(loaded.model).state_dict(),
        optimizers=[],
        scaler={},
    )


def test_saved_checkpoint_loads_equal(state: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state, path)
    loaded = checkpoint.load(path)
    for name in Checkpoint.model_fields.keys() - {"model"}:
        assert getattr(loaded, name) == getattr(state, name)
    assert all(torch.equal(loaded.model[key], state.model[key]) for key in state.model)
    assert loaded.parsed_recipe() == recipe.load("A1")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_checkpoint_executes_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        path = tmp_path / "checkpoint.pt"
        write({"format": 1, "payload": Payload()}, path)
        with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
            checkpoint.load(path)
    assert not (tmp_path / "executed").exists()
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(CheckpointError, match="checkpoint: it holds more than tensors and plain values"):
        checkpoint.load(path)


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_truncated_checkpoint_is_recognised(state: Checkpoint, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: damaged"):
        checkpoint.load(path)


def _said_to_be_encrypted(content: bytes) -> bytes:
    entry = content.index(b"PK\x01\x02")  # the first member's, in the archive's directory
    return content[: entry + 8] + bytes([content[entry + 8] | 1]) + content[entry + 9 :]


@pytest.mark.parametrize("damage", [lambda content: content[:1000], _said_to_be_encrypted])
def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before_it(
    state: Checkpoint, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "checkpoint.pt"
    for epoch in (1, 2):
        checkpoint.save(state.model_copy(update={"epoch": epoch}), path)
    path.write_bytes(damage(path.read_bytes()))
    resumed, _ = checkpoint.load_last(path)
    assert resumed.epoch == 1
    checkpoint.save(resumed.model_copy(update={"epoch": 3}), path)
    assert checkpoint.load(path).epoch == 3
    assert checkpoint.load(checkpoint.previous(path)).epoch == 1


def test_commit_is_of_the_sessions_that_trained(state: Checkpoint) -> None:
    assert state.commit == state.run["commit"]
    session = provenance.session(0, 0, "a processor", "float32", 1)
    at = ((0, "a"), (3, "b"), (5, "b"), (state.parsed_recipe().epochs, "c"))
    sessions = [{**session, "epoch": epoch, "commit": commit} for epoch, commit in at]
    assert state.model_copy(update={"sessions": sessions}).commit == "a + b"


def test_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    others: list[dict[str, object]] = [{"state_dict": {}}, {"format": 2, "model": {}}]
    for other in others:
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
            checkpoint.load(path)
    torch.save({"format": 1, "model": {}}, path)
    with pytest.raises(CheckpointError, match="recipe: Field required"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a file; a run is named by its folder, "):
        checkpoint.load(path / "checkpoint.pt")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that fails to be read")
def test_checkpoint_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.symlink_to("/proc/self/mem")  # an error even for root
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be read: .*Input/output error"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("epoch", -1, "epoch"),
        ("step", "3", "step"),
        ("run", {"seed": 0}, "run.limit"),
        ("classes", list(CLASSES[::-1]), "classes"),
        ("model", {"head.weight": [1.0]}, "model.head.weight"),
        ("result", {"views": "none"}, "result.date"),
        ("result", {"date": "", "recipe": "", "recipe_digest": "", "seed": "0"}, "result.seed"),
        ("more", 1, "more"),
    ],
)
def test_wrong_contents_name_the_place(
    state: Checkpoint, tmp_path: Path, key: str, value: object, place: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state, path)
    data = torch.load(path, weights_only=True)
    torch.save(data | {key: value}, path)
    with pytest.raises(CheckpointError, match=f"damaged or not a checkpoint: {place}: "):
        checkpoint.load(path)


def test_optimizers_of_another_network_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    state = checkpoint.load(uninterrupted / "checkpoint.pt")
    empty: dict[str, Any] = {"state": {}, "param_groups": []}
    for optimizers in ([], [empty]):
        changed = state.model_copy(update={"optimizers": optimizers, "result": None})
        with pytest.raises(CheckpointError, match=r"\.pt: the optimizers do not fit recipe short"):
            Run(tmp_path, changed, data.load_sample(), Processes(), Console(quiet=True))


def test_weights_of_another_network_are_refused(state: Checkpoint, tmp_path: Path) -> None:
    state.model = build(recipe.load("fast").model).state_dict()
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state, path)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(path).network()
    assert str(raised.value).startswith(f"{path}: the weights do not fit recipe A1: ")


def test_a_recipe_that_is_not_valid_here_is_named_with_the_file(
    state: Checkpoint, tmp_path: Path
) -> None:
    state.recipe["epochs"] = 0
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state, path)
    with pytest.raises(RecipeError) as raised:
        checkpoint.load(path).parsed_recipe()
    assert str(raised.value).startswith(f"recipe A1 in {path}: key epochs: ")
