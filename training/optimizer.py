"""Optimizers of the recipes; each parameter group keeps its recipe's rate as ``base_lr``."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from training import recipe
from training.model import WhitenedResNet


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by a Newton-Schulz iteration, for convolution filters.

    K. Jordan et al., 2024 (kellerjordan.github.io/posts/muon), in the form of airbench94: each filter
    bank is rescaled to norm sqrt(output channels) before its step, so ``lr`` is a relative rate.
    torch's own Muon takes matrices only and does not rescale.

    Args:
        params: float tensors [out, in, height, width].
        lr: the rate. momentum: Nesterov momentum in 0..1.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            # Filters of one shape together: on a GPU each operation of a small one costs as much.
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group["lr"], group["momentum"])

    def _update(self, parameters: list[Tensor], lr: float | Tensor, share: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, share)
        torch._foreach_add_(momenta, gradients)
        directions = torch._foreach_add(gradients, momenta, alpha=share)
        updates = orthogonalise(torch.stack([each.flatten(1) for each in directions])) * lr
        norms = torch._foreach_norm(parameters)
        for parameter, norm, update in zip(parameters, norms, updates, strict=True):
            parameter.mul_(len(parameter) ** 0.5 / norm).sub_(update.view_as(parameter))


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [B, M, N] with their singular values brought nearer to 1, by Newton-Schulz steps.

    The quintic's coefficients are from the Muon post. Its five steps leave values within about 0.5 to
    1.5; the three of airbench94, which are enough for training, leave small ones below.
    """
    x: Tensor = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(3):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def build(config: recipe.Optimizer, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe for ``model``: one, or Muon and the SGD beside it.

    On a GPU they are torch's fused ones: the gradient scaler of fp16 makes any other wait in every step
    for the device to say whether there was an infinite gradient, and they can read their rate there.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(parameter.is_cuda for parameter in trained)
    optimizers: list[torch.optim.Optimizer]
    match config:
        case recipe.SGD():
            optimizers = [
                torch.optim.SGD(
                    trained,
                    lr=config.lr,
                    momentum=config.momentum,
                    nesterov=config.nesterov,
                    weight_decay=config.weight_decay,
                    fused=fused,
                )
            ]
        case recipe.Adam():
            optimizers = [
                torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
            ]
        case recipe.AdamW():
            optimizers = [
                torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
            ]
        case recipe.Muon():
            optimizers = _muon_and_sgd(config, model, trained, fused)
        case _:
            assert_never(config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


@contextmanager
def reading_rates(groups: Sequence[dict[str, Any]], rates: Sequence[Tensor]) -> Iterator[None]:
    """Steps whose ``groups`` read their rates from these scalars on a GPU, as those of a graph must."""
    kept = [dict(group) for group in groups]
    capturing = torch.cuda.is_current_stream_capturing()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:  # Adam's, which refuses or warns where this is not as it is
            group["capturable"] = capturing
    try:
        yield
    finally:
        for group, before in zip(groups, kept, strict=True):
            group.update(before)


def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that may be from another device; whether the optimizer is fused stays as it is.

    torch would take that from the state: where Adam's counts of steps belong hangs on it, and the scaler
    leaves it to a fused one to scale back.

    Raises:
        ValueError: the state is of other parameters.
    """
    groups = [
        saved | ({"fused": own["fused"]} if "fused" in own else {})
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})


def _muon_and_sgd(
    config: recipe.Muon, model: nn.Module, trained: list[nn.Parameter], fused: bool
) -> list[torch.optim.Optimizer]:
    assert isinstance(model, WhitenedResNet)  # as the recipe's validation has it
    # A rate here is for the mean loss over a batch; weight decay is a fraction lost a step at that
    # rate whatever the rate is, as airbench has it (and momentum multiplies the decay as it does the
    # gradient).
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim == 1], "lr": config.bias_lr},
        {"params": [model.head.weight], "lr": config.head_lr},
    ]
    for group in groups:
        group["weight_decay"] = config.weight_decay / group["lr"]
    return [
        torch.optim.SGD(
            groups, lr=config.bias_lr, momentum=config.sgd_momentum, nesterov=True, fused=fused
        ),
        Muon([p for p in trained if p.ndim == 4], config.lr, config.momentum),
    ]
