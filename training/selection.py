"""Learning from the hardest images of each batch: a small network, trained beside, says which.

After airbench96_faster.py (K. Jordan, github.com/KellerJordan/cifar10-airbench), which trains the small
network first and keeps its choices; here both make each step together, so a run has one past and nothing
is computed twice. As there, the small network learns only from what it chooses: what it has not chosen
for long, it forgets, and chooses again. There it learns in every fourth step only, here in each.
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
    """The small network of a recipe's selection and what it chooses.

    Args:
        recipe: whose ``selection`` this is; it gives label smoothing too.
        config: that selection.
        seed: of the network's weights.
        images: the first of them whiten its stem.
        processes: that share each batch.
        device: where the batches lie.
        as_stepped: gives a network as the steps run it, on inputs of a batch of so many images.

    Attributes:
        count: how many of a batch of so many are chosen.
        network, optimizers: with their states, which a run saves and loads.
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
        """Choose from a batch, by the losses of the network as it trains.

        Args:
            inputs: this process's share of the batch, float [N, 3, S, S].
            labels: int64 [N], theirs.
            images: of the whole batch.

        Returns:
            The small network's loss, a scalar whose mean over the processes is that over all that are
            chosen, and which of ``inputs`` are: int64, ascending; as many as ``count`` says in all
            processes together.
        """
        logits = self._forward(inputs, images)
        losses = F.cross_entropy(
            logits.float(), labels, label_smoothing=self._smoothing, reduction="none"
        )
        count = self.count(images)
        chosen = self._hardest(losses.detach(), count, images)
        return losses[chosen].sum() * (self._processes.count / count), chosen

    def _hardest(self, losses: Tensor, count: int, images: int) -> Tensor:
        if self._processes.count == 1:  # as many whatever they are, so a GPU is not waited for
            return losses.topk(count).indices.sort().values
        own = self._processes.rows(images)
        everywhere = losses.new_zeros(images)
        everywhere[own] = losses
        chosen = self._processes.total(everywhere).topk(count).indices.sort().values
        mine = (chosen >= own.start) & (chosen < own.stop)
        places: Tensor = chosen[mine] - own.start
        return places
