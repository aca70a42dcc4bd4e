import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from training import model, optimizer, recipe


def test_orthogonalise_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 64, 200), (2, 200, 64)):
        matrix = torch.randn(shape)
        result = optimizer.orthogonalise(matrix)
        values = torch.linalg.svdvals(result)
        assert result.shape == shape
        assert 0.5 < values.min() < values.max() < 1.5


def test_muon_keeps_the_norm_of_filters_and_moves_them() -> None:
    torch.manual_seed(0)
    filters = torch.nn.Parameter(torch.randn(16, 8, 3, 3))
    muon = optimizer.Muon([filters], lr=0.1, momentum=0.6)
    before = filters.detach().clone()
    filters.grad = torch.randn_like(filters)
    muon.step()
    scaled = before * 4 / before.norm()
    assert not torch.allclose(filters, scaled)
    assert (filters - scaled).norm() < 0.1 * 4 * 1.6


def test_muon_steps_in_half_precision_are_those_in_full_within_its_rounding() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(64, 32, 3, 3), torch.randn(64, 32, 3, 3)
    moved = []
    for half in (False, True):
        filters = nn.Parameter(start.clone())
        filters.grad = gradient.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            optimizer.Muon([filters], lr=0.1, momentum=0.6).step()
        moved.append(filters.detach() - start * 8 / start.norm())
    assert moved[0].dtype == moved[1].dtype == torch.float32
    assert not torch.equal(*moved)
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


@pytest.mark.parametrize("name", recipe.names())
def test_every_trained_parameter_is_in_one_group(name: str) -> None:
    loaded = recipe.load(name)
    network = model.build(loaded.model)
    groups = [
        group for part in optimizer.build(loaded.optimizer, network) for group in part.param_groups
    ]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(trained)
    assert all(group["base_lr"] == group["lr"] > 0 for group in groups)


def test_a_state_from_another_device_does_not_say_whether_to_fuse() -> None:
    """torch's own loading would decide it; but only a fused optimizer unscales a scaler's gradients."""
    parameter = torch.ones(3, requires_grad=True)
    saved = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=False)
    parameter.grad = torch.ones(3)
    saved.step()
    fused = torch.optim.SGD([parameter], lr=0.2, momentum=0.9, fused=True)
    optimizer.load(fused, saved.state_dict())
    (group,) = fused.param_groups
    assert group["fused"]
    assert group["lr"] == 0.1
    assert torch.equal(fused.state[parameter]["momentum_buffer"], torch.ones(3))


def test_a_first_step_that_is_skipped_leaves_no_momentum() -> None:
    parameter = nn.Parameter(torch.ones(3))
    built = optimizer.sgd([parameter], lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    for gradient in (torch.inf, 1.0):
        parameter.grad = torch.full((3,), gradient) * scaler.get_scale()
        scaler.step(built)
        scaler.update()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(built.state[parameter]["momentum_buffer"], torch.ones(3))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_state_from_a_cpu_comes_as_a_whole_to_a_fused_optimizer_elsewhere(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    here, there = (nn.Parameter(torch.ones(3, device=place)) for place in ("cpu", "meta"))
    saved = kind([here], lr=0.1, fused=False)
    here.grad = torch.ones(3)
    saved.step()
    loaded = kind([there], lr=0.1, fused=True)
    optimizer.load(loaded, saved.state_dict())
    values = [each for each in loaded.state[there].values() if isinstance(each, torch.Tensor)]
    assert len(values) == (0 if kind is torch.optim.SGD else 3)
    assert {each.device.type for each in values} <= {"meta"}


@pytest.mark.parametrize("name", ["A3", "B1", "E1", "fast"])
def test_steps_read_their_rates_from_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the step that a GPU's graph captures; it is tested on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    loaded = recipe.load(
        name, ["model.widths=[8,8,8]", "model.depths=[1,1,1]"] if name == "fast" else []
    )
    torch.manual_seed(0)
    network = model.build(loaded.model) if name == "fast" else nn.Linear(7, 5)
    other = copy.deepcopy(network)
    for each, from_tensors in ((network, False), (other, True)):
        optimizers = optimizer.build(loaded.optimizer, each)
        groups = [group for part in optimizers for group in part.param_groups]
        rates = [torch.tensor(group["lr"] / 2) for group in groups]
        for group in groups:
            group["lr"] /= 1 if from_tensors else 2
        for step in range(3):
            for parameter in each.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            with optimizer.reading_rates(groups, rates) if from_tensors else nullcontext():
                for part in optimizers:
                    part.step()
        assert all(isinstance(group["lr"], float) for group in groups)
        assert not any(group.get("capturable") for group in groups)
    for parameter, same in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same)


REPORTED: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "A3": lambda parameters: torch.optim.SGD(parameters, lr=0.112202, momentum=0.9, weight_decay=5e-4),
    "B1": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4),
    "B2": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4),
    "C1": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "D1": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4),
    "E1": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.001),
}


@pytest.mark.parametrize("name", REPORTED)
def test_steps_are_those_of_the_report(name: str) -> None:
    """The optimizer that reports.md names, built by hand, changes the same weights in the same way."""
    config = recipe.load(name).optimizer
    torch.manual_seed(0)
    ours = nn.Linear(7, 5)
    theirs = copy.deepcopy(ours)
    (first,), second = optimizer.build(config, ours), REPORTED[name](list(theirs.parameters()))
    for _ in range(5):
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        first.step()
        second.step()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize(("shape", "longer"), [((16, 8, 3, 3), 1), ((16, 4), 2)])
def test_muon_steps_are_the_papers(shape: tuple[int, ...], longer: float) -> None:
    """By hand for a layer's weights: orthogonalised Nesterov momentum, from weights of a fixed norm."""
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(shape))
    expected, momentum = weights.detach().clone(), torch.zeros(shape)
    muon = optimizer.Muon([weights], lr=0.1, momentum=0.6)
    for _ in range(3):
        weights.grad = gradient = torch.randn_like(weights)
        muon.step()
        momentum = 0.6 * momentum + gradient
        direction = (gradient + 0.6 * momentum).flatten(1)[None]
        update = optimizer.orthogonalise(direction)[0].view_as(weights)
        expected = expected * 4 / expected.norm() - 0.1 * longer * update
        torch.testing.assert_close(weights.detach(), expected)


def test_each_weight_of_seresnet_learns_in_one_place() -> None:
    loaded = recipe.load("seresnet")
    network = model.build(loaded.model)
    sgd, muon = optimizer.build(loaded.optimizer, network)
    biases, head, hidden = (
        {id(parameter) for parameter in group["params"]}
        for group in (*sgd.param_groups, *muon.param_groups)
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[each] for each in head} == {"head.weight"}
    assert all(names[each].endswith("bias") for each in biases)
    excited = {names[each] for each in hidden if "excit" in names[each]}
    assert len(excited) == 6  # two layers in each of three stages
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert biases | head | hidden == trained


def test_fast_has_the_rates_and_decays_of_airbench() -> None:
    config = recipe.load("fast").optimizer
    assert isinstance(config, recipe.Muon)
    sgd, muon = optimizer.build(config, model.build(recipe.load("fast").model))
    assert (muon.defaults["lr"], muon.defaults["momentum"]) == (config.lr, config.momentum)
    for group, lr in zip(sgd.param_groups, (config.bias_lr, config.head_lr), strict=True):
        assert (group["lr"], group["momentum"], group["nesterov"]) == (lr, config.sgd_momentum, True)
        # The fraction that a step takes off a weight at the recipe's rate, whatever that is.
        assert group["lr"] * group["weight_decay"] == pytest.approx(config.weight_decay)
