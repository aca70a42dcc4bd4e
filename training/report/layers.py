"""A network's layers with their output shapes, parameters and memory.

Like the summaries in the reports; torchinfo, which writes such ones, has had no release since 2023.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.batch import SIZE
from training.model import parameter_count


@dataclass(frozen=True)
class Layer:
    """A call of a module that has no submodules.

    ``name`` is its name in the network, ``kind`` its class, ``shape`` that of its output for one image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Summary:
    """The layers in the order of their calls; sizes in bytes of float32.

    ``activation_bytes`` are those of the layers' outputs for one image and of their gradients. What a
    network does outside of its modules, such as an activation called as a function, is not counted.
    """

    layers: list[Layer]
    parameters: int
    trainable: int
    parameter_bytes: int
    activation_bytes: int


@torch.no_grad()
def summarize(network: nn.Module) -> Summary:
    """Summarise ``network`` by passing one image of 32x32 pixels through it, on the CPU."""
    layers: list[Layer] = []

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        shape = tuple(output.shape[1:])
        layers.append(Layer(name, type(module).__name__, shape, parameter_count(module)))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in network.named_modules()
        if not any(module.children()) and not isinstance(module, nn.Identity)
    ]
    try:
        network.eval()(torch.zeros(1, 3, SIZE, SIZE))
    finally:
        for hook in hooks:
            hook.remove()
    count = parameter_count(network)
    values = sum(torch.Size(layer.shape).numel() for layer in layers)
    return Summary(
        layers=layers,
        parameters=count,
        trainable=sum(each.numel() for each in network.parameters() if each.requires_grad),
        parameter_bytes=4 * count,
        activation_bytes=2 * 4 * values,
    )
