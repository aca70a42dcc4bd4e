import itertools
from typing import Any

import pytest
import torch

from tests.compiler import needs_a_compiler
from training import data, device, recipe
from training.learner import Learner, TrainingError
from training.processes import Processes


@pytest.mark.parametrize("size", [4, 64, 300])
def test_batches_are_the_same_from_whatever_step_on(size: int) -> None:
    chosen = recipe.load("E1", [f"batch_size={size}", "model.widths=[16,16,16]"])
    images = data.load_sample().train
    learner = Learner(chosen, 3, images, Processes())
    all_of_them = list(learner.batches(1))
    assert [batch.step for batch in all_of_them] == list(range(learner.steps))
    assert [batch.count for batch in all_of_them] == [len(part) for part in learner.order(1)]
    for batch, places in zip(all_of_them, learner.order(1), strict=True):
        assert torch.equal(batch.labels, images.labels[places])
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    for first in (1, learner.steps // 2, learner.steps - 1):
        for batch, expected in zip(learner.batches(1, first), all_of_them[first:], strict=True):
            assert (batch.epoch, batch.step) == (1, expected.step)
            assert torch.equal(batch.inputs, expected.inputs)


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for variable, value in (("WORLD_SIZE", "3"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(variable, value)
    chosen, images = recipe.load("A1"), data.load_sample().train
    with pytest.raises(TrainingError, match=r"process 3 on a machine with 2 GPUs: .*-node 2"):
        Learner(chosen, 0, images, Processes())


@needs_a_compiler
@pytest.mark.parametrize("name", ["A1", "fast"])
def test_compiled_steps_are_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 too, even if it is only emulated, though compiled code rounds in other places."""
    half = name == "fast"
    changes = ["model.widths=[8]", "model.depths=[1]"] if half else []
    chosen, images = recipe.load(name, ["batch_size=32", *changes]), data.load_sample().train
    if half:
        monkeypatch.setattr(device, "precision", lambda amp, place: torch.bfloat16)
    rate = (0.001 if half else 1.0).__mul__  # rounding matters more at high learning rates
    losses, networks = [], []
    for compiled in (False, True):
        learner = Learner(chosen, 0, images, Processes(), compiled=compiled)
        assert learner.precision.endswith(", compiled") == compiled
        batches = itertools.islice(learner.batches(0), 3)
        losses.append([learner.learn(batch, rate)[0].item() for batch in batches])
        networks.append(learner.result.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=0.01 if half else 1e-6)
    assert networks[1].keys() == networks[0].keys()
    for part, values in networks[0].items():
        torch.testing.assert_close(networks[1][part], values, rtol=1e-3, atol=0.01 if half else 1e-4)


@needs_a_compiler
def test_nothing_is_compiled_for_a_batch_that_never_is_whole() -> None:
    chosen, images = recipe.load("A1"), data.load_sample().train.first(50)
    learner = Learner(chosen, 0, images, Processes(), compiled=True)
    assert learner.to_compile([0]) == []
    (batch,) = learner.batches(0)
    loss, _ = learner.learn(batch, float)
    assert loss.item() / 50 == pytest.approx(2.3, abs=0.1)


def test_steps_of_several_processes_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen, images = recipe.load("A1"), data.load_sample().train
    with pytest.raises(TrainingError, match="in a single process only: leave out --compile"):
        Learner(chosen, 0, images, Processes(), compiled=True)


@pytest.mark.parametrize(("name", "alike"), [("A1", True), ("D1", False)])
def test_processes_mix_alike_and_drop_out_each_its_own(
    name: str, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["mixing={kind='mixup', alpha=1.0, p=0.5, epochs=[0, 1]}", "batch_size=64"]
    settings += ["model.widths=[8,8,8,8]"] * (name == "D1")
    chosen, images, losses = recipe.load(name, settings), data.load_sample().train.first(256), []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        learner = Learner(chosen, 0, images, Processes())
        losses.append([learner.learn(batch, float)[0].item() for batch in learner.batches(0)])
    assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == alike


def test_of_a_mixed_image_the_class_with_the_largest_share_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ["mixing={kind='mixup', alpha=0.4, p=1.0, epochs=[0, 1]}", "batch_size=64"]
    learner = Learner(recipe.load("A1", settings), 0, data.load_sample().train.first(256), Processes())
    mixed: list[torch.Tensor] = []
    mix = learner._objective.mix

    def remembered(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = mix(*arguments)
        mixed.append(targets)
        return inputs, targets

    monkeypatch.setattr(learner._objective, "mix", remembered)
    monkeypatch.setattr(learner, "_forward", lambda *_: mixed[-1].clone().requires_grad_())
    batches = list(learner.batches(0))
    for batch in batches:
        assert learner.learn(batch, float)[1].item() == 64
    firsts = [
        (targets.argmax(1) == batch.labels).all() for targets, batch in zip(mixed, batches, strict=True)
    ]
    assert not all(firsts), "some have another image's class for the most part"
