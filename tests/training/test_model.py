import pytest
import torch

from training import data, model, recipe
from training.augment import Normalize


@pytest.mark.parametrize("name", recipe.names())
def test_logits_of_ten_classes(name: str) -> None:
    network = model.build(recipe.load(name).model).eval()
    assert network(torch.randn(3, 3, 32, 32)).shape == (3, 10)


def test_whitened_patches_have_unit_covariance() -> None:
    fast = recipe.load("fast")
    network = model.build(fast.model)
    assert isinstance(network, model.WhitenedResNet)
    normalize = Normalize(fast.data.mean, fast.data.std)
    images = normalize(data.load_sample().train.pixels.permute(0, 3, 1, 2))
    network.whiten(images, epsilon=0.0)
    responses = network.stem(images).permute(1, 0, 2, 3).flatten(1)
    half = len(responses) // 2
    covariance = responses[:half] @ responses[:half].T / responses.shape[1]
    torch.testing.assert_close(covariance, torch.eye(half), atol=2e-2, rtol=0)
    torch.testing.assert_close(responses[half:], -responses[:half])


def test_whitened_resnet_works_at_smaller_sizes() -> None:
    network = model.build(recipe.load("fast").model).eval()
    for size in (16, 20, 24, 32):
        assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_a3_initialises_convolutions_by_fan_out() -> None:
    torch.manual_seed(0)
    network = model.build(recipe.load("A3").model)
    assert isinstance(network, model.ResNet)
    weight = network.stages[3][2].conv2.weight  # type: ignore[index]
    assert isinstance(weight, torch.Tensor)
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
