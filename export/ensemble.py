"""What a model file computes: trained networks with their views, averaged and calibrated."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.evaluate import Classifier

ROUNDED = "PyTorch, rounded"


class Ensemble(nn.Module):
    """One classifier, or several whose probabilities are averaged, and a calibration.

    Probabilities are averaged (Lakshminarayanan et al., 2017, arXiv:1612.01474) rather than logits, so
    that every member counts the same whatever the scale of its logits; the logits of the ensemble are
    the logarithms of the averages. Within a member, the views' logits are averaged, as in training.

    Args:
        members: the classifiers.
        temperature, exponent: the calibration, as ``export.calibration`` describes it.
    """

    def __init__(
        self, members: Sequence[Classifier], temperature: float = 1.0, exponent: float = 1.0
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperature, self.exponent = temperature, exponent

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [N, 10], of RGB ``images``, uint8 [N, 32, 32, 3]."""
        each = [member(images) for member in self.members]
        logits: Tensor = each[0]
        if len(each) > 1:
            stacked = torch.stack([F.log_softmax(logits, 1) for logits in each])
            logits = stacked.logsumexp(0) - math.log(len(each))
        return calibrate(logits, self.temperature, self.exponent)


def calibrate(logits: Tensor, temperature: float, exponent: float) -> Tensor:
    """Calibrate ``logits``, float32 [N, 10], as ``export.calibration`` describes it.

    An exponent of 1 needs no distances: files with a temperature alone only divide by it.
    """
    if exponent == 1:
        return logits if temperature == 1 else logits / temperature
    # A provider may round the largest logit and not the others, and a negative number has no power.
    # Unlike ReLU, this leaves NaN as it is.
    distances = (logits.amax(1, keepdim=True) - logits).abs()
    return -((distances / temperature) ** exponent)


class Half(nn.Module):
    """A network in fp16 whose input and logits are float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 [N, 10], of normalised images, float32 [N, 3, 32, 32]."""
        logits: Tensor = self.network(x.half()).float()
        return logits


def half(ensemble: Ensemble) -> Ensemble:
    """A copy whose networks compute in fp16; normalisation, averages and calibration stay float32."""
    ensemble = copy.deepcopy(ensemble)
    for member in ensemble.members:
        assert isinstance(member, Classifier)
        member.model = Half(member.model)
    return ensemble


def rounded(ensemble: Ensemble) -> Ensemble:
    """A copy that computes in float32 what ``half`` gives on a GPU; a CPU has no such arithmetic.

    The weights and the inputs and outputs of each layer are rounded to fp16; values too large for fp16
    become infinite.
    """
    ensemble = copy.deepcopy(ensemble)
    for member in ensemble.members:
        assert isinstance(member, Classifier)
        for layer in member.model.half().float().modules():
            if not list(layer.children()):
                layer.register_forward_pre_hook(lambda _, inputs: tuple(map(_round, inputs)))
                layer.register_forward_hook(lambda _, inputs, output: _round(output))
    return ensemble


def _round(x: Tensor) -> Tensor:
    return x.half().float()
