"""Networks as a run begins with them."""

import torch
from torch import nn

from training import model
from training.augment import Normalize
from training.data import Images
from training.recipe import Data, Model


def initial_network(config: Model, data: Data, seed: int, images: Images) -> nn.Module:
    """A network with the weights that ``seed`` gives, on the CPU.

    Args:
        config: the recipe's description of it.
        data: the recipe's normalisation.
        seed: of the weights.
        images: the training images; the first of them whiten the stem that a network may have.
    """
    torch.manual_seed(seed)
    network = model.build(config)
    if isinstance(network, model.WhitenedResNet):
        normalize = Normalize(data.mean, data.std)
        network.whiten(normalize(images.pixels[:5000].permute(0, 3, 1, 2)))
    return network
