"""Predictions and accuracy of a network on uint8 images, always in float32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import Normalize
from training.data import Images
from training.recipe import Recipe, Views

# The weights of the averaged views, those that are not mirrored first. As in airbench's six views
# (K. Jordan, arXiv:2404.00498), a shifted view weighs half as much as one that is not.
SHARES: dict[Views, tuple[float, ...]] = {
    "none": (1.0,),
    "flip": (0.5, 0.5),
    "flip_shift": (0.25, 0.125, 0.125, 0.25, 0.125, 0.125),
}


# Images that pass through a network at once, each view counted as one.
AT_ONCE = 500


class Classifier(nn.Module):
    """A network with what a recipe puts around it: normalisation and the averaging of views.

    This module is what ``export`` turns into a model file.

    Args:
        model: maps normalised images to logits.
        recipe: gives mean, std and the ``views`` whose logits are averaged.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.normalize = Normalize(recipe.data.mean, recipe.data.std)
        self.model = model
        self.views = recipe.views
        self.shares: Tensor
        self.register_buffer("shares", torch.tensor(SHARES[self.views]).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [N, 10], of RGB ``images``, uint8 [N, 32, 32, 3]."""
        x = self.normalize(images.permute(0, 3, 1, 2))
        if self.views == "none":
            logits: Tensor = self.model(x)
            return logits
        views = [x]
        if self.views == "flip_shift":
            size, padded = x.shape[-1], F.pad(x, (1, 1, 1, 1), mode="reflect")
            views += [padded[..., :size, :size], padded[..., 2:, 2:]]
        logits = self.model(torch.cat([*views, *(view.flip(-1) for view in views)]))
        averaged: Tensor = (logits.unflatten(0, (len(self.shares), -1)) * self.shares).sum(0)
        return averaged


@dataclass(frozen=True)
class Evaluation:
    """Number of correct predictions and summed cross-entropy over ``images`` images."""

    correct: int
    loss_sum: float
    images: int

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions."""
        return self.correct / self.images

    @property
    def loss(self) -> float:
        """The mean cross-entropy."""
        return self.loss_sum / self.images


@torch.no_grad()
def logits(classifier: nn.Module, pixels: Tensor, batch_size: int) -> Tensor:
    """Logits, float32 [N, 10], of ``pixels``, uint8 [N, 32, 32, 3], in evaluation mode."""
    classifier.eval()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([classifier(batch) for batch in pixels.split(batch_size)])


def at_once(views: Views) -> int:
    """How many images to evaluate at a time: fewer with several views, to take no more memory."""
    return AT_ONCE // len(SHARES[views])


def predict(model: nn.Module, recipe: Recipe, pixels: Tensor) -> Tensor:
    """As ``logits``, of ``model`` with a recipe's views; ``pixels`` must be on the model's device."""
    classifier = Classifier(model, recipe).to(pixels.device)
    return logits(classifier, pixels, at_once(recipe.views))


def evaluate(model: nn.Module, recipe: Recipe, images: Images) -> Evaluation:
    """Evaluate ``model`` with a recipe's views; ``images`` must be on the model's device."""
    predicted = predict(model, recipe, images.pixels)
    return Evaluation(
        correct=int((predicted.argmax(1) == images.labels).sum().item()),
        loss_sum=F.cross_entropy(predicted, images.labels, reduction="sum").item(),
        images=len(images),
    )
