"""The networks that a run begins with, and checks that they take the recipe's images."""

import copy

import torch
from torch import nn

from training import device, model
from training.augment import Normalize
from training.batch import SIZE
from training.data import Images
from training.recipe import Model, Recipe, RecipeError


def initial_network(config: Model, recipe: Recipe, seed: int, images: Images) -> nn.Module:
    """Build a network on the CPU, with initial weights from ``seed``.

    Args:
        config: the recipe's description of it.
        recipe: gives the normalisation and the sizes that training images are scaled to.
        seed: of the weights.
        images: the training images; the first 5,000 set the whitening stem, if the network has one.

    Raises:
        RecipeError: the network does not take images of one of these sizes, or does not fit into memory.
    """
    torch.manual_seed(seed)
    try:
        network = model.build(config)
    except RuntimeError as error:
        if not device.out_of_memory(error):
            raise
        raise RecipeError(f"model: out of memory with a network of this size: {error}") from error
    if isinstance(network, model.WhitenedResNet):
        normalize = Normalize(recipe.data.mean, recipe.data.std)
        network.whiten(normalize(images.pixels[:5000].permute(0, 3, 1, 2)))
    check_sizes(network, recipe, "model")
    return network


@torch.no_grad()
def check_alone(network: nn.Module, recipe: Recipe, smallest: int) -> None:
    """Check that a network can learn from its ``smallest`` batch, if that is a single image.

    Raises:
        RecipeError: it cannot: a single pixel is left of the image, and BatchNorm needs more values.
    """
    if smallest > 1:
        return
    network = copy.deepcopy(network)  # a forward pass changes its statistics
    for size in _sizes(recipe):
        try:
            network(torch.zeros(1, 3, size, size))
        except ValueError as error:
            raise RecipeError(
                f"a step would learn from one image of {size} x {size} pixels, which leaves BatchNorm "
                "a single value: set another batch_size, drop_last=true or another selection.share"
            ) from error


@torch.no_grad()
def check_sizes(network: nn.Module, recipe: Recipe, place: str) -> None:
    """Check that a network takes images of all sizes that the recipe uses, scaled or not.

    Raises:
        RecipeError: it does not; the message begins with ``place``.
    """
    network.eval()
    for size in _sizes(recipe):
        try:
            network(torch.zeros(1, 3, size, size))
        except RuntimeError as error:
            raise RecipeError(
                f"{place}: this network does not take images of {size} x {size} pixels: {error}"
            ) from error
    network.train()


def _sizes(recipe: Recipe) -> list[int]:
    return sorted({SIZE, *(part.size for part in recipe.resolution)})
