"""The exponential moving average of a network's weights and statistics."""

import copy

import torch
from torch import nn


class Average:
    """A copy of ``network`` that averages its weights and statistics over the steps.

    As in torch's swa_utils, but for the shares of the first steps (see ``update``), and without reading
    a value from the device in every step.

    Attributes:
        network: the average, in evaluation mode.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, steps: int) -> None:
        """Update the average after a step of ``network``; ``steps`` is the number of steps before it.

        The share of a step is ``1 - decay`` or, in the beginning, 9 / (10 + steps): otherwise the
        initial, random weights would stay in the average for long.
        """
        share = max(1 - self.decay, 9 / (10 + steps))
        averages, values = self.network.state_dict(), network.state_dict()
        floats = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[n] for n in floats], [values[n] for n in floats], share)
        for name in values.keys() - set(floats):
            averages[name].copy_(values[name])
