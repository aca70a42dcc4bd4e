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


def test_squeeze_excitation_weighs_channels() -> None:
    torch.manual_seed(0)
    layer = model.SqueezeExcitation(8, 4)
    x = torch.randn(2, 8, 5, 5)
    ratio = layer(x) / x
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    assert ((ratio > 0) & (ratio < 1)).all()
    assert layer.squeeze.weight.shape == (2, 8)


@pytest.mark.parametrize(
    ("block", "parameters"),
    [
        # By hand: 1x1, 3x3 and 1x1 convolutions with two numbers a channel of BatchNorm each.
        ("{kind='bottleneck', reduction=4, groups=1}", 32 * 8 + 8 * 8 * 9 + 8 * 32 + 2 * (8 + 8 + 32)),
        ("{kind='bottleneck', reduction=2, groups=4}", 32 * 16 + 16 * 4 * 9 + 16 * 32 + 2 * (32 + 32)),
        ("{kind='basic'}", 2 * 32 * 32 * 9 + 2 * (32 + 32)),
    ],
)
def test_blocks_have_the_parameters_of_their_papers(block: str, parameters: int) -> None:
    settings = ["model.blocks=[1, 1]", "model.widths=[32, 32]", f"model.block={block}"]
    network = model.build(recipe.load("B2", settings).model)
    assert isinstance(network, model.ResNet)
    assert model.parameter_count(network.stages[0]) == parameters
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_widths_that_blocks_cannot_have() -> None:
    with pytest.raises(recipe.RecipeError, match="64 is not a multiple of"):
        recipe.load("B2", ["model.block={kind='bottleneck', reduction=4, groups=3}"])
    with pytest.raises(recipe.RecipeError, match="squeeze_excitation 100 leaves none of 64"):
        recipe.load("B2", ["model.squeeze_excitation=100"])


@pytest.mark.parametrize("width", [3, 8, 16])
def test_the_gradient_of_a_narrow_shortcut(width: int) -> None:
    """oneDNN's own crashes, hangs or is wrong where the width is under 8 or, with AVX512, under 16."""
    settings = ["model.blocks=[1, 1]", f"model.widths=[{width}, 24]"]
    torch.manual_seed(0)
    network = model.build(recipe.load("B2", settings).model)
    images, weights = torch.randn(8, 3, 32, 32), torch.randn(8, 10)
    gradients = []
    for dtype in (torch.float64, torch.float32):  # oneDNN has no part in the former
        network.zero_grad()
        network.to(dtype).to(memory_format=torch.channels_last)
        inputs = images.to(dtype).contiguous(memory_format=torch.channels_last)
        (network(inputs) * weights).sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for exact, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(computed, exact.float(), rtol=1e-3, atol=1e-3)
