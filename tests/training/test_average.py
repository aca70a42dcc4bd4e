from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from training import checkpoint, data, recipe, train
from training.average import Average
from training.checkpoint import CheckpointError
from training.learner import Learner
from training.processes import Processes
from training.watch import Watch


def test_average_follows_by_its_share() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(network, decay=0.75)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    network(torch.randn(4, 2))  # changes the statistics too
    average.update(network, steps=1000)
    for key, value in average.network.state_dict().items():
        expected = network.state_dict()[key]
        if value.is_floating_point():
            expected = 0.75 * before[key] + 0.25 * expected
        torch.testing.assert_close(value, expected)


def test_first_steps_forget_the_initial_weights() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = Average(network, decay=0.9999)
    nn.init.zeros_(average.network.get_parameter("weight"))
    nn.init.ones_(network.weight)
    for step in range(20):
        average.update(network, step)
    assert average.network.get_parameter("weight").item() > 0.99


def test_average_takes_no_gradient_and_leaves_the_network_alone() -> None:
    network = nn.Linear(3, 3)
    weight = network.weight.clone()
    average = Average(network, decay=0.5)
    average.update(network, 5)
    assert torch.equal(network.weight, weight)
    assert network.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert not average.network.training


def test_a_checkpoint_without_the_average_is_an_error(tmp_path: Path) -> None:
    chosen, dataset = recipe.load("A1", ["averaging={decay=0.999}"]), data.load_sample()
    train.create(tmp_path, chosen, "A1", 0, dataset, unchanged=False)
    path = tmp_path / checkpoint.FILE
    checkpoint.save(checkpoint.load(path).model_copy(update={"average": None}), path)
    with pytest.raises(CheckpointError, match=r"(?s)the weights do not fit recipe A1: .*Missing key"):
        train.resume(tmp_path, dataset, Console(quiet=True), Watch(), Processes())


def test_the_steps_of_earlier_epochs_count() -> None:
    chosen = recipe.load("A1", ["averaging={decay=0.999}", "batch_size=100"])
    learner = Learner(chosen, 0, data.load_sample().train, Processes())
    assert learner.average is not None
    averages = learner.average.network.state_dict()
    before = {key: value.clone() for key, value in averages.items()}
    learner.learn(next(learner.batches(2, 3)), float)
    for key, value in learner.model.state_dict().items():
        expected = before[key].lerp(value, 9 / (10 + 2 * 5 + 3))
        torch.testing.assert_close(averages[key], expected)
