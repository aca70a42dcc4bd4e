"""Images for a page: embedded in it as PNG, and augmented as a recipe trains on them."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from training.augment import Augmenter
from training.data import Images
from training.objective import Objective
from training.recipe import Recipe

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Augmented:
    """Images, uint8 [N, S, S, 3], as they are trained on in ``epoch`` (0 is the first)."""

    epoch: int
    pixels: Tensor


def data_uri(pixels: Tensor) -> str:
    """An image, uint8 [H, W, 3] RGB on the CPU, as a PNG in a ``data:`` URI."""
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def augmented(recipe: Recipe, seed: int, images: Images, indices: Tensor, times: int) -> list[Augmented]:
    """Training images as a recipe trains on them, in ``times`` epochs from its first to its last.

    The operations, image sizes and mixing are the recipe's own; the random numbers are not those of
    the run, but always the same.

    Args:
        recipe: that of the run.
        seed: that of the run.
        images: all its training images.
        indices: int64 [N], which of them to show.
        times: in how many epochs to show them.
    """
    augmenter = Augmenter(recipe, len(images), seed, CPU)
    # A teacher changes what is learnt of an image, not the image.
    objective = Objective(recipe.model_copy(update={"distillation": None}), Path(), CPU)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    shown = []
    epochs = map(round, torch.linspace(0, recipe.epochs - 1, times).tolist())
    for number, epoch in enumerate(epochs):
        drawn = augmenter.draw(indices, epoch, torch.Generator().manual_seed(number))
        inputs = augmenter.apply(images.pixels[indices], drawn, epoch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            inputs, _ = objective.mix(inputs, images.labels[indices], epoch)
        pixels = ((inputs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        shown.append(Augmented(epoch, pixels.permute(0, 2, 3, 1).contiguous()))
    return shown
