"""What a trained network predicts for labelled images, and where it is wrong."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training import device, evaluate
from training.data import Images
from training.recipe import Recipe


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction: the image's index among those predicted, and the classes' indices."""

    place: int
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Predictions:
    """``images`` on the CPU and the network's ``probabilities`` for them, float32 [N, classes]."""

    images: Images
    probabilities: Tensor

    @property
    def correct(self) -> int:
        """How many of the images are classified correctly."""
        return int(self.confusion().trace())

    def confusion(self) -> Tensor:
        """Images by class (rows) and predicted class (columns), int64 [classes, classes]."""
        classes = self.probabilities.shape[1]
        cells = self.images.labels * classes + self.probabilities.argmax(1)
        return torch.bincount(cells, minlength=classes**2).view(classes, classes)

    def most_confused(self) -> int:
        """The largest number of images of one class that are taken for one other class."""
        confusion = self.confusion()
        return int((confusion - confusion.diag().diag()).max())

    def class_accuracies(self) -> dict[int, float]:
        """The accuracy on the images of each class that has any."""
        confusion = self.confusion()
        counts = confusion.sum(1).tolist()
        right = confusion.diag().tolist()
        return {label: right[label] / count for label, count in enumerate(counts) if count}

    def mistakes(self, count: int) -> list[Mistake]:
        """The wrong predictions with the highest probabilities, highest first, at most ``count``."""
        probability, predicted = self.probabilities.max(1)
        wrong = (predicted != self.images.labels).nonzero().flatten()
        worst = wrong[probability[wrong].argsort(descending=True, stable=True)][:count]
        return [
            Mistake(
                place=place,
                label=int(self.images.labels[place]),
                predicted=int(predicted[place]),
                probability=float(probability[place]),
            )
            for place in worst.tolist()
        ]


def predict(network: nn.Module, recipe: Recipe, images: Images) -> Predictions:
    """What ``network`` predicts with a recipe's views, on the training device, in float32."""
    place = device.choose()
    network = network.to(place).to(memory_format=torch.channels_last)
    predicted = evaluate.predict(network, recipe, images.pixels.to(place))
    return Predictions(images, predicted.softmax(1).cpu())
