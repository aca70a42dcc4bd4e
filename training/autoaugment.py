"""AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019, arXiv:1805.09501), on batches.

Each image gets one of 25 sub-policies: two operations, each with a probability and a magnitude from 0
to 9. Tables, signs and rounding are those of torchvision.transforms.v2.AutoAugment.
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from training import color, geometry

# fmt: off
POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
)
# fmt: on

OPERATIONS = sorted({name for pair in POLICY for name, _, _ in pair})
SIGNED = (
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
)

# The magnitudes 0 to 9 in the operation's own unit, for images of 32 pixels.
_SHIFT = torch.linspace(0, 150 / 331 * 32, 10)
_FACTOR = torch.linspace(0, 0.9, 10)
MAGNITUDES = {
    "shear_y": torch.linspace(0, 0.3, 10),
    "translate_x": _SHIFT,
    "translate_y": _SHIFT,
    "rotate": torch.linspace(0, 30, 10),
    "brightness": _FACTOR,
    "color": _FACTOR,
    "contrast": _FACTOR,
    "sharpness": _FACTOR,
    "posterize": 8 - (torch.arange(10) / (9 / 4)).round(),
    "solarize": torch.linspace(1, 0, 10),
}


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random operations of ``count`` images, each with two slots.

    Returns:
        Places in ``OPERATIONS``, int64 [count, 2], -1 where none is applied; and signed magnitudes,
        float64 [count, 2].
    """
    policy = torch.randint(len(POLICY), (count,), generator=generator)
    chances = torch.rand(count, 2, generator=generator)
    signs = torch.rand(count, 2, generator=generator)
    applied = chances <= _TABLE["probability"][policy]
    negative = _TABLE["signed"][policy].bool() & (signs <= 0.5)
    magnitudes = _TABLE["magnitude"][policy]
    operations = _TABLE["operation"][policy].long()
    return torch.where(applied, operations, -1), torch.where(negative, -magnitudes, magnitudes)


def apply(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Apply what ``draw`` gave, on the host, to uint8 ``images`` [N, 3, 32, 32] on any device."""
    images = images.clone()
    for slot in range(2):
        for index in operations[:, slot].unique().tolist():
            if index >= 0:
                rows = (operations[:, slot] == index).nonzero().flatten()
                values = magnitudes[rows, slot].to(images.device, non_blocking=True)
                rows = rows.to(images.device, non_blocking=True)
                images[rows] = operate(OPERATIONS[index], images[rows], values)
    return images


def operate(name: str, images: Tensor, magnitudes: Tensor) -> Tensor:
    """One operation on uint8 ``images`` [N, 3, 32, 32] with signed ``magnitudes``, float [N]."""
    zero = torch.zeros_like(magnitudes)
    match name:
        case "shear_y":
            return geometry.affine(images, geometry.shears(zero, magnitudes, images.shape[-1]))
        case "translate_x":
            return geometry.affine(images, geometry.translations(magnitudes.trunc(), zero))
        case "translate_y":
            return geometry.affine(images, geometry.translations(zero, magnitudes.trunc()))
        case "rotate":
            return geometry.affine(images, geometry.rotations(magnitudes))
        case "brightness":
            return color.brightness(images, 1 + magnitudes)
        case "color":
            return color.saturation(images, 1 + magnitudes)
        case "contrast":
            return color.contrast(images, 1 + magnitudes)
        case "sharpness":
            return color.sharpness(images, 1 + magnitudes)
        case "posterize":
            return color.posterize(images, magnitudes)
        case "solarize":
            return color.solarize(images, 255 * magnitudes)
        case "auto_contrast":
            operation = functional.autocontrast
        case "equalize":
            operation = functional.equalize
        case "invert":
            operation = functional.invert
    out: Tensor = operation(images)
    return out


def _table() -> dict[str, Tensor]:
    columns: dict[str, list[list[float]]] = {
        "operation": [[OPERATIONS.index(name) for name, _, _ in pair] for pair in POLICY],
        "probability": [[p for _, p, _ in pair] for pair in POLICY],
        "signed": [[name in SIGNED for name, _, _ in pair] for pair in POLICY],
        "magnitude": [
            [MAGNITUDES[name][level].item() if name in MAGNITUDES else 0.0 for name, _, level in pair]
            for pair in POLICY
        ],
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


_TABLE = _table()
