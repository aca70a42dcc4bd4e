"""What a step minimises: cross-entropy, perhaps of mixed images, and divergence from a teacher."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import checkpoint as checkpoints
from training.initial import check_sizes
from training.model import CLASSES
from training.recipe import Distillation, Mixing, Recipe


class Objective:
    """The loss of a recipe.

    Args:
        recipe: gives label smoothing, mixing and distillation.
        teacher: the checkpoint to distil from; None: the recipe's, if it has one.
        device: that of the batches.

    Raises:
        CheckpointError, RecipeError: the teacher cannot be used, or is not finished.
    """

    def __init__(self, recipe: Recipe, teacher: Path | None, device: torch.device) -> None:
        self._smoothing = recipe.label_smoothing
        self._mix: tuple[Mixing, nn.Module] | None = None
        if recipe.mixing is not None:
            from torchvision.transforms import v2  # takes seconds to import, which few runs need

            kind = v2.MixUp if recipe.mixing.kind == "mixup" else v2.CutMix
            self._mix = recipe.mixing, kind(alpha=recipe.mixing.alpha, num_classes=len(CLASSES))
        self._teacher: Teacher | None = None
        if recipe.distillation is not None:
            path = teacher or Path(recipe.distillation.teacher)
            self._teacher = Teacher(recipe, recipe.distillation, path).to(device)

    def mix(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Mix a step's images, float [N, 3, H, W], if the recipe says so; returns images and targets.

        Targets are the ``labels``, int64 [N], or float32 [N, 10] if mixed. Images are mixed only in the
        recipe's epochs (``epoch`` 0 is the first), at random from torch's global generator.
        """
        if self._mix is None:
            return images, labels
        mixing, mix = self._mix
        first, end = mixing.epochs
        # Drawn on the host, so that nothing waits for the device.
        if not first <= epoch < end or torch.rand(()).item() >= mixing.p:
            return images, labels
        mixed, targets = mix(images, labels)
        return mixed.contiguous(memory_format=torch.channels_last), targets

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The summed loss, a scalar, of ``logits`` [N, 10] (N may be 0) for what ``mix`` returned."""
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self._smoothing)
        if self._teacher is not None:
            weight = self._teacher.weight
            loss = (1 - weight) * loss + weight * self._teacher.loss(logits, images)
        return loss


class Teacher(nn.Module):
    """A trained network, whose weights stay fixed, and the divergence from its softened outputs."""

    def __init__(self, recipe: Recipe, config: Distillation, path: Path) -> None:
        super().__init__()
        state = checkpoints.load(path)
        state.check_finished()
        self.weight, self.temperature = config.weight, config.temperature
        network = state.network()
        check_sizes(network, recipe, f"distillation.teacher {path}")
        self.network = network.eval().requires_grad_(False)
        own = state.parsed_recipe().data
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (recipe.data.mean, recipe.data.std, own.mean, own.std)
        )
        # The images come normalised for the student.
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def loss(self, logits: Tensor, images: Tensor) -> Tensor:
        """Kullback-Leibler divergence at the temperature T, times T squared (Hinton et al., 2015)."""
        with torch.no_grad():
            answer = self.network(images * self.scale + self.shift).float()
            taught = F.log_softmax(answer / self.temperature, 1)
        learned = F.log_softmax(logits.float() / self.temperature, 1)
        divergence = F.kl_div(learned, taught, reduction="sum", log_target=True)
        return divergence * self.temperature**2
