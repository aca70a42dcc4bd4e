"""Optimizers of the recipes; each parameter group keeps the recipe's rate as ``base_lr``."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from training import recipe
from training.model import WhitenedResNet


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by a Newton-Schulz iteration, for hidden layers' weights.

    K. Jordan et al., 2024 (kellerjordan.github.io/posts/muon), in the form of airbench94: each layer's
    weights are rescaled to norm sqrt(output channels) before their step, so ``lr`` is a relative rate.
    There all layers have more inputs than outputs. Where it is the other way round, the step is longer
    here by the square root of outputs / inputs, so that it is as large a part of the norm; torch's own
    Muon, which takes matrices only and does not rescale them, does so too.

    Args:
        params: float tensors [out, in, height, width] or [out, in].
        lr: the learning rate.
        momentum: Nesterov momentum in 0..1.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not supported."""
        for group in self.param_groups:
            # Weights of one shape are updated together: on a GPU, one alone would cost as much.
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
        matrices = torch.stack([each.flatten(1) for each in directions])
        _, outputs, inputs = matrices.shape
        updates = orthogonalise(matrices) * (lr * max(1, outputs / inputs) ** 0.5)
        norms = torch._foreach_norm(parameters)
        for parameter, norm, update in zip(parameters, norms, updates, strict=True):
            parameter.mul_(len(parameter) ** 0.5 / norm).sub_(update.view_as(parameter))


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [B, M, N] with their singular values brought nearer to 1, by Newton-Schulz steps.

    The quintic's coefficients are from the Muon post. Its five steps bring values to about 0.5 to 1.5;
    the three of airbench94, used here and enough for training, leave small ones below that.
    """
    x: Tensor = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(3):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def build(config: recipe.Optimizer, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Build a recipe's optimizers for ``model``: a single one, or SGD and then Muon.

    On a GPU torch's own are fused: with any other, fp16's gradient scaler waits in every step for the
    device to tell whether a gradient was infinite; and a fused one can read its rate on the device.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(parameter.is_cuda for parameter in trained)
    optimizers: list[torch.optim.Optimizer]
    match config:
        case recipe.SGD():
            optimizers = [
                sgd(
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
    """Let ``groups`` read their learning rates from scalars on the GPU, as a graph's steps must."""
    kept = [dict(group) for group in groups]
    capturing = torch.cuda.is_current_stream_capturing()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:  # Adam's, which refuses or warns if this is set wrongly
            group["capturable"] = capturing
    try:
        yield
    finally:
        for group, before in zip(groups, kept, strict=True):
            group.update(before)


def sgd(parameters: list[Any], **settings: Any) -> torch.optim.SGD:
    """torch's SGD; a fused one with momentum begins with one of 0.

    Else it would be made in the first step, of whatever was in the memory, and stay so if that step was
    skipped for an infinite gradient.
    """
    built = torch.optim.SGD(parameters, **settings)
    if settings["fused"] and settings["momentum"]:
        for group in built.param_groups:
            for parameter in group["params"]:
                built.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return built


def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that may be from another device; whether the optimizer is fused does not change.

    torch would take that from the state, but the place of Adam's step counts depends on it, and so does
    whether the gradient scaler or the optimizer itself scales the gradients back.

    Raises:
        ValueError: the state is that of other parameters.
    """
    groups = [
        saved | ({"fused": own["fused"]} if "fused" in own else {})
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})


def _muon_and_sgd(
    config: recipe.Muon, model: nn.Module, trained: list[nn.Parameter], fused: bool
) -> list[torch.optim.Optimizer]:
    assert isinstance(model, WhitenedResNet)  # ensured by the recipe's validation
    # Rates are for the mean loss over a batch. Weight decay is the fraction of a weight lost in a step
    # at the recipe's rate, whatever that is, as in airbench (and momentum multiplies the decay as it
    # does the gradient).
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim == 1], "lr": config.bias_lr},
        {"params": [model.head.weight], "lr": config.head_lr},
    ]
    for group in groups:
        group["weight_decay"] = config.weight_decay / group["lr"]
    return [
        sgd(groups, lr=config.bias_lr, momentum=config.sgd_momentum, nesterov=True, fused=fused),
        Muon(
            [p for p in trained if p.ndim > 1 and p is not model.head.weight],
            config.lr,
            config.momentum,
        ),
    ]
