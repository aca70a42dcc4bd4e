"""The reports' networks and ours, built from a recipe's ``model`` table.

Every network maps normalised images, float [N, 3, H, W], to logits, float [N, 10].
"""

from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import recipe

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class BasicCNN(nn.Module):
    """The PyTorch tutorial's network (report A1): two 5x5 convolutions, three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.head(F.relu(self.fc2(x)))
        return logits


def activation(name: str) -> nn.Module:
    """The activation of a recipe; report A's LeakyReLU has slope 0.1."""
    return nn.LeakyReLU(0.1) if name == "leaky_relu" else nn.ReLU()


class SqueezeExcitation(nn.Module):
    """Scales channels by weights computed from their means (Hu et al., 2018, arXiv:1709.01507)."""

    def __init__(self, width: int, config: recipe.SqueezeExcitation) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // config.reduction)
        self.excite = nn.Linear(width // config.reduction, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * weights[:, :, None, None]


def excitation(width: int, config: recipe.SqueezeExcitation | None) -> nn.Module:
    """What a residual of ``width`` channels passes through before it is added."""
    return nn.Identity() if config is None else SqueezeExcitation(width, config)


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution with a stride, for few input channels.

    In channels-last memory, oneDNN's own writes past its workspace if there are fewer channels than
    places in its vectors, at most 16: wrong gradients, a crash, or a hang (its issue 6035). So the
    pixels are picked first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve float ``x`` [N, C, H, W]."""
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], self.weight)


class ResidualBlock(nn.Module):
    """Convolutions with BatchNorm, optional squeeze and excitation, and a shortcut.

    The shortcut is the identity, or a 1x1 convolution with BatchNorm if the shape changes.
    """

    def __init__(self, width_in: int, width: int, stride: int, config: recipe.ResNet) -> None:
        super().__init__()
        self.activation = activation(config.activation)
        self.excitation = excitation(width, config.squeeze_excitation)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            kind = StridedPointwise if stride != 1 and width_in < 16 else nn.Conv2d
            self.shortcut = nn.Sequential(
                kind(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def branch(self, x: Tensor) -> Tensor:
        """The residual, float [N, width, H, W] at the block's stride, before the excitation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.excitation(self.branch(x)) + self.shortcut(x))
        return out


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, width_in: int, width: int, stride: int, config: recipe.ResNet) -> None:
        super().__init__(width_in, width, stride, config)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return out


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions (He et al., 2016); with groups, ResNeXt's block.

    That is form C of Xie et al., 2017, arXiv:1611.05431. The 3x3 convolution has the stride.
    """

    def __init__(self, width_in: int, width: int, stride: int, config: recipe.ResNet) -> None:
        super().__init__(width_in, width, stride, config)
        assert isinstance(config.block, recipe.Bottleneck)
        inner, groups = width // config.block.reduction, config.block.groups
        self.conv1 = nn.Conv2d(width_in, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.conv1(x)))
        x = self.activation(self.norm2(self.conv2(x)))
        out: Tensor = self.norm3(self.conv3(x))
        return out


class ResNet(nn.Module):
    """The reports' ResNet: 3x3 stem without max-pool, stages of residual blocks, average pool, head."""

    def __init__(self, config: recipe.ResNet) -> None:
        super().__init__()
        stem_width = config.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem_width, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            activation(config.activation),
        )
        self.stages = nn.Sequential()
        block_class: type[ResidualBlock]
        match config.block:
            case recipe.BasicBlock():
                block_class = BasicBlock
            case recipe.Bottleneck():
                block_class = Bottleneck
            case _:
                assert_never(config.block)
        width_in = stem_width
        for index, (blocks, width) in enumerate(zip(config.blocks, config.widths, strict=True)):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(block_class(width_in, width, stride, config))
                width_in = width
            self.stages.append(stage)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width_in, len(CLASSES))
        if config.init == "kaiming_fan_out":
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x)).mean((2, 3))
        logits: Tensor = self.head(self.dropout(x))
        return logits


class WhitenedStage(nn.Module):
    """Convolution, 2x2 max-pool, then a residual branch of ``depth`` convolutions."""

    def __init__(
        self, width_in: int, width: int, depth: int, config: recipe.SqueezeExcitation | None
    ) -> None:
        super().__init__()
        self.conv = _dirac_conv(width_in, width)
        self.norm = _norm(width)
        self.branch = nn.Sequential()
        for index in range(depth):
            if index > 0:
                self.branch.append(nn.GELU())
            self.branch.append(_dirac_conv(width, width))
            self.branch.append(_norm(width))
        self.excitation = excitation(width, config)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(F.max_pool2d(self.conv(x), 2)))
        return F.gelu(x + self.excitation(self.branch(x)))


class WhitenedResNet(nn.Module):
    """A residual network after K. Jordan's airbench (arXiv:2404.00498) and D. Page's ResNet-9.

    The stem is a fixed 2x2 convolution that whitens patches of the training images; each stage pools
    right after its first convolution and then adds a residual branch. Filters begin as the identity
    on their first input channels, BatchNorm has no scale, and the head's logits are divided by its
    width. The global max-pool makes it work at any image size from 2**stages + 1 pixels on, which is 9
    for three stages.
    """

    def __init__(self, config: recipe.WhitenedResNet) -> None:
        super().__init__()
        kernel = 2
        self.stem = nn.Conv2d(3, 2 * 3 * kernel**2, kernel, bias=False)
        self.stem.weight.requires_grad_(False)
        self.stages = nn.Sequential()
        width_in = self.stem.out_channels
        for width, depth in zip(config.widths, config.depths, strict=True):
            self.stages.append(WhitenedStage(width_in, width, depth, config.squeeze_excitation))
            width_in = width
        self.head = nn.Linear(width_in, len(CLASSES), bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    @torch.no_grad()
    def whiten(self, images: Tensor, epsilon: float = 5e-4) -> None:
        """Set the stem from normalised training images, float [N, 3, H, W].

        Its filters are the eigenvectors of the patches' second moments (about 0, which is nearly their
        mean), each scaled so that its output has second moment 1, and their negatives; ``epsilon`` (in
        squared normalised pixels) bounds the scale.
        """
        size = self.stem.kernel_size[0]
        patches = F.unfold(images.contiguous(), size).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / torch.sqrt(values + epsilon)).T.reshape(-1, 3, size, size)
        self.stem.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.gelu(self.stem(x)))
        # Not amax: its gradient looks for the maximum again; compiled code, which rounds elsewhere, may
        # not find it, and then divides by zero.
        x = F.max_pool2d(x, x.shape[2:]).flatten(1)
        logits: Tensor = self.head(x) / self.head.in_features
        return logits


def _dirac_conv(width_in: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:width_in])
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    # A run has few steps, so its running statistics have to follow the batches quickly.
    norm = nn.BatchNorm2d(width, momentum=0.4, eps=1e-12)
    norm.weight.requires_grad_(False)
    return norm


def build(config: recipe.Model) -> nn.Module:
    """Build a recipe's network, initialised from torch's global generator."""
    match config:
        case recipe.BasicCNN():
            return BasicCNN()
        case recipe.ResNet():
            return ResNet(config)
        case recipe.WhitenedResNet():
            return WhitenedResNet(config)
        case _:
            assert_never(config)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters, trained or fixed (buffers such as running means not counted)."""
    return sum(parameter.numel() for parameter in model.parameters())
