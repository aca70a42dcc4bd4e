import pytest
import torch

from training import model, optimizer, recipe


def test_orthogonalise_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((64, 200), (200, 64)):
        matrix = torch.randn(shape)
        result = optimizer.orthogonalise(matrix, steps=5)
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


def test_muon_refuses_networks_without_rates_of_their_own() -> None:
    fast = recipe.load("fast")
    with pytest.raises(recipe.RecipeError, match="whitened_resnet"):
        optimizer.build(fast.optimizer, model.build(recipe.load("B2").model))
