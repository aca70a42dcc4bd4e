"""Learning from the hardest images of each batch, chosen by a small network that is trained alongside.

After airbench96_faster.py (K. Jordan, github.com/KellerJordan/cifar10-airbench), which trains the small
network first and keeps its choices; here both networks take each step together, so a run has a single
history and nothing is computed twice. As there, the small network learns only from the images that it
chooses: those it has not chosen for long it forgets, and so chooses again. There it learns in every
fourth step only, here in each.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import optimizer
from training.data import Images
from training.initial import initial_network
from training.processes import Processes
from training.recipe import Recipe, Selection


class Selector:
    """The small network of a recipe's selection, and its choices.

    Args:
        recipe: gives normalisation, image sizes and label smoothing.
        config: its ``selection``.
        seed: of the network's weights.
        images: the training images; the first 5,000 set the whitening stem, if the network has one.
        processes: those that share each batch.
        device: that of the batches.
        as_stepped: turns a network into a function of inputs and of the whole batch's image count.

    Attributes:
        count: how many images of a batch are chosen, as a function of its size.
        network, optimizers: a run saves and loads their states.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: Selection,
        seed: int,
        images: Images,
        processes: Processes,
        device: torch.device,
        as_stepped: Callable[[nn.Module], Callable[[Tensor, int], Tensor]],
    ) -> None:
        self._smoothing, self._processes = recipe.label_smoothing, processes
        self.count = config.count
        network = initial_network(config.model, recipe, seed, images)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self._network = processes.parallel(self.network)
        self._forward = as_stepped(self._network)
        self.optimizers = optimizer.build(config.optimizer, self.network)

    def select(self, inputs: Tensor, labels: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """Choose the images of a batch on which the small network, in training, has the highest losses.

        Args:
            inputs: this process's share of the batch, float [N, 3, S, S].
            labels: int64 [N], the labels of ``inputs``.
            images: number of images in the whole batch.

        Returns:
            The small network's loss, a scalar whose mean over the processes is the mean over all chosen
            images; and the indices of the chosen ``inputs``, int64, ascending. All processes together
            choose as many as ``count`` says.
        """
        logits = self._forward(inputs, images)
        losses = F.cross_entropy(
            logits.float(), labels, label_smoothing=self._smoothing, reduction="none"
        )
        count = self.count(images)
        chosen = self._hardest(losses.detach(), count, images)
        return losses[chosen].sum() * (self._processes.count / count), chosen

    def _hardest(self, losses: Tensor, count: int, images: int) -> Tensor:
        if self._processes.count == 1:  # always ``count`` of them, so nothing waits for a GPU
            return losses.topk(count).indices.sort().values
        own = self._processes.rows(images)
        everywhere = losses.new_zeros(images)
        everywhere[own] = losses
        chosen = self._processes.total(everywhere).topk(count).indices.sort().values
        mine = (chosen >= own.start) & (chosen < own.stop)
        places: Tensor = chosen[mine] - own.start
        return places
