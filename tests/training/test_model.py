from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet

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
    weight = network.stages[3][0].conv1.weight  # type: ignore[index]  # from 256 channels to 512
    assert isinstance(weight, torch.Tensor)
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_squeeze_excitation_weighs_channels() -> None:
    torch.manual_seed(0)
    layer = model.SqueezeExcitation(8, recipe.SqueezeExcitation(reduction=4))
    x = torch.randn(2, 8, 5, 5)
    ratio = layer(x) / x
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    assert ((ratio > 0) & (ratio < 1)).all()
    assert layer.squeeze.weight.shape == (2, 8)


@pytest.mark.parametrize(
    ("block", "parameters"),
    [
        # By hand: 1x1, 3x3 and 1x1 convolutions, each with two numbers per channel of BatchNorm.
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
    for name in ("B2", "fast"):
        with pytest.raises(recipe.RecipeError, match="reduction 100 exceeds width 64"):
            recipe.load(name, ["model.squeeze_excitation={reduction=100}"])


@pytest.mark.parametrize("width", [3, 8, 16])
def test_the_gradient_of_a_narrow_shortcut(width: int) -> None:
    """oneDNN's own gradient crashes, hangs or is wrong for widths under 8 or, with AVX512, under 16."""
    settings = ["model.blocks=[1, 1]", f"model.widths=[{width}, 24]"]
    torch.manual_seed(0)
    network = model.build(recipe.load("B2", settings).model)
    images, weights = torch.randn(8, 3, 32, 32), torch.randn(8, 10)
    gradients = []
    for dtype in (torch.float64, torch.float32):  # the former does not use oneDNN
        network.zero_grad()
        network.to(dtype).to(memory_format=torch.channels_last)
        inputs = images.to(dtype).contiguous(memory_format=torch.channels_last)
        (network(inputs) * weights).sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for exact, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(computed, exact.float(), rtol=1e-3, atol=1e-3)


THEIR_NAMES = (
    ("shortcut", "downsample"),
    ("norm", "bn"),
    ("head", "fc"),
    ("stem.0", "conv1"),
    ("stem.1", "bn1"),
)


def with_weights_of(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """torchvision's module in evaluation mode with the weights of ``ours``; vectors are drawn anew."""
    torch.manual_seed(0)
    state = {}
    for name, value in ours.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if value.ndim == 1 else value)
        for our, their in THEIR_NAMES:
            name = name.replace(our, their)
        if name.startswith("stages."):
            _, stage, rest = name.split(".", 2)
            name = f"layer{int(stage) + 1}.{rest}"
        state[name] = value
    theirs.load_state_dict(state)
    ours.eval()
    return theirs.eval()


@pytest.mark.parametrize(("name", "slope"), [("A3", 0.1), ("B2", 0.0)])
def test_resnets_are_torchvisions(name: str, slope: float) -> None:
    """torchvision's with a stem for small images and, for A3, the report's activation."""
    config = recipe.load(name).model
    assert isinstance(config, recipe.ResNet)
    stages = len(config.blocks)
    theirs = resnet.ResNet(resnet.BasicBlock, [*config.blocks, 1][:4], num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    if stages == 3:
        theirs.layer4, theirs.fc = nn.Identity(), nn.Linear(256, 10)
    for module in theirs.modules():
        if hasattr(module, "relu"):
            module.relu = nn.LeakyReLU(slope)
    ours = model.build(config)
    with_weights_of(theirs, ours)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("reduction", "groups"), [(4, 1), (2, 4)])
def test_bottlenecks_are_torchvisions(reduction: int, groups: int) -> None:
    block = f"{{kind='bottleneck', reduction={reduction}, groups={groups}}}"
    settings = ["model.blocks=[1, 1]", "model.widths=[32, 64]", f"model.block={block}"]
    network = model.build(recipe.load("B2", settings).model)
    assert isinstance(network, model.ResNet)
    ours = network.stages[1][0]  # type: ignore[index]
    shortcut = nn.Sequential(nn.Conv2d(32, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64))
    base = 64 * 4 // reduction // groups
    theirs = with_weights_of(resnet.Bottleneck(32, 16, 2, shortcut, groups, base), ours)
    x = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_squeeze_excitation_is_of_the_residual_alone() -> None:
    settings = ["model.blocks=[1]", "model.widths=[8]", "model.squeeze_excitation={reduction=4}"]
    network = model.build(recipe.load("B2", settings).model)
    block: Any = network.stages[0][0]  # type: ignore[index]
    nn.init.constant_(block.excitation.excite.bias, -1e4)  # switches off all channels of the residual
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_seresnet_is_fast_with_its_residuals_excited() -> None:
    plain, excited = recipe.load("fast"), recipe.load("seresnet")
    assert plain == excited.model_copy(
        update={
            "title": plain.title,
            "model": excited.model.model_copy(update={"squeeze_excitation": None}),
        }
    )
    torch.manual_seed(0)
    network = model.build(excited.model)
    stage: Any = network.stages[1]  # type: ignore[index]
    x = torch.randn(2, 64, 8, 8)
    nn.init.constant_(stage.excitation.excite.bias, -1e4)
    pooled = nn.functional.max_pool2d(stage.conv(x), 2)
    torch.testing.assert_close(stage(x), nn.functional.gelu(nn.functional.gelu(stage.norm(pooled))))


def test_d1_drops_half_of_what_the_head_sees_in_training_only() -> None:
    torch.manual_seed(0)
    network, seen = model.build(recipe.load("D1").model), []
    assert isinstance(network, model.ResNet)
    network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(8, 3, 32, 32)
    for training in (False, True):
        network.train(training)(images)
    nothing = [(each == 0).double().mean().item() for each in seen]
    assert nothing[0] < 0.2
    assert 0.4 < nothing[1] < 0.7


def test_whitened_resnet_begins_as_airbench_has_it() -> None:
    network = model.build(recipe.load("fast").model)
    assert isinstance(network, model.WhitenedResNet)
    stage: Any = network.stages[0]
    torch.manual_seed(0)
    x = torch.randn(16, 24, 6, 6)
    torch.testing.assert_close(stage.conv(x)[:, :24], x)
    assert network.head.weight.std().item() == pytest.approx(1)
    stage(x + 3)
    mean = nn.functional.max_pool2d(stage.conv(x + 3), 2).mean((0, 2, 3))
    torch.testing.assert_close(stage.norm.running_mean, 0.4 * mean)
