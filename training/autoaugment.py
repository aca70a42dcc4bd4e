"""AutoAugment's CIFAR-10 policy on whole batches (Cubuk et al., 2019, arXiv:1805.09501).

Each image draws one of 25 sub-policies: two operations, each with a probability and a level. Policy,
magnitudes and signs are those of torchvision's ``AutoAugment(AutoAugmentPolicy.CIFAR10)``, which E1 ran.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from training.batch import SIZE, Array, Parameters, by_group, uniform
from training.color import adjust, autocontrast, equalize, posterize, sharpen, solarize
from training.geometry import rotate, shear, shift

POLICY: tuple[tuple[tuple[str, float, int | None], tuple[str, float, int | None]], ...] = (
    (("invert", 0.1, None), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, None), ("equalize", 0.9, None)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, None), ("equalize", 0.5, None)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, None), ("autocontrast", 0.4, None)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, None)),
    (("equalize", 0.2, None), ("autocontrast", 0.6, None)),
    (("equalize", 0.2, None), ("equalize", 0.6, None)),
    (("color", 0.9, 9), ("equalize", 0.6, None)),
    (("autocontrast", 0.8, None), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, None)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, None), ("solarize", 0.8, 3)),
    (("equalize", 0.8, None), ("invert", 0.1, None)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, None)),
)


def draw(count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``apply`` for ``count`` images from the policy."""
    drawn = torch.randint(len(POLICY), (count,), generator=generator).numpy()
    operations, probabilities, magnitudes, signed = (column[drawn] for column in _COLUMNS)
    chance, sign = uniform(generator, 2, count, 2)
    return {
        "operations": np.where(chance < probabilities, operations, OPERATIONS.index("identity")),
        "magnitudes": np.where(signed & (sign < 0.5), -magnitudes, magnitudes),
    }


def apply(images: Tensor, operations: Array, magnitudes: Array) -> Tensor:
    """Apply to each image its first operation, then its second.

    Args:
        images: uint8 [N, 32, 32, 3].
        operations: integers [N, 2], indices into ``OPERATIONS``.
        magnitudes: float [N, 2], by operation as in torchvision: a slope, pixels, degrees, an offset to
            a factor of 1, bits to keep, or a threshold as a fraction of the highest level.
    """
    for operation, magnitude in zip(operations.T, magnitudes.T, strict=True):
        images = by_group(
            images,
            _FAMILY[operation],
            lambda family, *of: _FAMILIES[family].apply(*of),
            _MEMBER[operation],
            magnitude,
        )
    return images


class _Family(NamedTuple):
    """Operations applied in one call: fewer calls on more images are faster on every device."""

    members: tuple[str, ...]
    magnitudes: Array  # at levels 0 to 9
    signed: bool  # whether the magnitude's sign is drawn
    apply: Callable[[Tensor, Array, Array], Tensor]  # of images, indices of members, magnitudes


def _shear(images: Tensor, axes: Array, slopes: Array) -> Tensor:
    return shear(images, right=slopes * (axes == 0), down=slopes * (axes == 1))


def _translate(images: Tensor, axes: Array, pixels: Array) -> Tensor:
    offsets = np.stack([pixels * (axes == 1), pixels * (axes == 0)], 1).astype(np.int64)  # towards 0
    return shift(images, offsets, int(_FARTHEST), "black")


def _spaced(first: float, last: float) -> Array:
    return torch.linspace(first, last, 10).double().numpy()  # rounded as in torchvision


_FARTHEST = 150 / 331 * SIZE
_BITS = np.array([8.0, 8.0, 7.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0, 4.0])
_NONE = np.zeros(10)
_FAMILIES = (
    _Family(("identity",), _NONE, False, lambda images, _, __: images),
    _Family(("shear_x", "shear_y"), _spaced(0, 0.3), True, _shear),
    _Family(("translate_x", "translate_y"), _spaced(0, _FARTHEST), True, _translate),
    _Family(("rotate",), _spaced(0, 30), True, lambda images, _, x: rotate(images, x)),
    _Family(
        ("brightness", "contrast", "color"),  # in the numbering of training.color
        _spaced(0, 0.9),
        True,
        lambda images, what, x: adjust(images, what, 1 + x),
    ),
    _Family(("sharpness",), _spaced(0, 0.9), True, lambda images, _, x: sharpen(images, 1 + x)),
    _Family(("posterize",), _BITS, False, lambda images, _, x: posterize(images, x.astype(int))),
    _Family(("solarize",), _spaced(1, 0), False, lambda images, _, x: solarize(images, 255 * x)),
    _Family(("invert",), _NONE, False, lambda images, _, __: 255 - images),
    _Family(("autocontrast",), _NONE, False, lambda images, _, __: autocontrast(images)),
    _Family(("equalize",), _NONE, False, lambda images, _, __: equalize(images)),
)
_PLACES = [
    (name, family, member)
    for family, part in enumerate(_FAMILIES)
    for member, name in enumerate(part.members)
]
OPERATIONS = tuple(name for name, _, _ in _PLACES)
_FAMILY = np.array([family for _, family, _ in _PLACES])
_MEMBER = np.array([member for _, _, member in _PLACES])


def _columns() -> tuple[Array, Array, Array, Array]:
    """The policy's operations, probabilities, magnitudes and whether they are signed, [25, 2] each."""
    operations = np.array([[OPERATIONS.index(name) for name, _, _ in pair] for pair in POLICY])
    probabilities = np.array([[p for _, p, _ in pair] for pair in POLICY])
    levels = np.array([[level or 0 for _, _, level in pair] for pair in POLICY])
    families = _FAMILY[operations]
    magnitudes = np.stack([part.magnitudes for part in _FAMILIES])[families, levels]
    signed = np.array([part.signed for part in _FAMILIES])[families]
    return operations, probabilities, magnitudes, signed


_COLUMNS = _columns()
