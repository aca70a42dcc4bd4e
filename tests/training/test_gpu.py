"""A GPU's steps on a machine without one, with tensors that have a device and a shape but no values.

Whatever asks for a value, and would have to wait for a GPU, fails on them, and so does whatever mixes
devices. Kernels do not run, so this shows neither results nor speed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training import data, device, recipe
from training.evaluate import predict
from training.learner import Learner
from training.processes import Processes

CUDA = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
WITHOUT_FORM = {  # torch lacks these for tensors without values; they only change their arguments
    getattr(torch.ops.aten, name).default for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_")
}
IMAGES, BATCH = 60, 20

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # by deepcopy
]


class Waited(AssertionError):
    """The host waits for a copy between itself and the device."""


class PretendedGPU(TorchDispatchMode):
    """Runs operations as if on ``cuda:0``.

    Attributes:
        hurries: whether a copy for which the host would wait fails.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hurries = False
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {tensor.device for tensor in tensors}
        if kwargs.get("device") is not None:
            places.add(kwargs["device"])
        if CUDA not in places and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        waits = len(places) > 1 and not (kwargs.get("non_blocking") or args[2:] == (True,))
        if func in COPIES and self.hurries and waits:
            raise Waited(f"{func} between {' and '.join(sorted(map(str, places)))}")
        if func in WITHOUT_FORM:
            assert {tensor.device for tensor in tensors} == {CUDA}
            return None
        with self._fake:
            return func(*args, **kwargs)


def _moved(network: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    """Stands in for ``Module.to``, whose way of replacing parameters these tensors do not support."""

    def moved(tensor: Tensor) -> Tensor:
        of_images = tensor.ndim == 4 or "memory_format" not in options
        return tensor.detach().to(*arguments, **options) if of_images else tensor

    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(moved(parameter), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, moved(buffer))
    return network


def _backward(loss: Tensor) -> None:
    """Set gradients for whatever ``loss`` was computed from; torch's ``backward`` asks the driver."""
    assert loss.device == CUDA
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGPU]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(device, "choose", lambda index=0: CUDA)
    monkeypatch.setattr(torch.cuda, "Event", mock.Mock)
    monkeypatch.setattr(nn.Module, "to", _moved)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.device == CUDA))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Tensor, "backward", _backward)
    with PretendedGPU() as mode:
        yield mode


@pytest.mark.parametrize("name", recipe.names())
def test_a_step_waits_for_nothing_and_stays_on_the_device(
    name: str, uninterrupted: Path, gpu: PretendedGPU
) -> None:
    # The teacher, A1's network, takes 32 pixels only.
    whole = ["resolution=[]"] if recipe.load(name).distillation is not None else []
    chosen = recipe.load(name, [f"batch_size={BATCH}", *whole])
    images = data.load_sample().train.first(IMAGES)
    teacher = uninterrupted / "checkpoint.pt"
    learner = Learner(chosen, 0, images, Processes(), teacher, compiled=False)
    gpu.hurries = True
    for epoch in {0, *(part.from_epoch for part in chosen.resolution), chosen.epochs - 1}:
        for batch in learner.batches(epoch):
            for found in learner.learn(batch, float):
                assert (found.device, found.ndim) == (CUDA, 0)
    gpu.hurries = False  # between epochs the program may wait for a result
    assert predict(learner.result, chosen, learner.images.pixels[:2]).device == CUDA


def test_what_waits_or_mixes_devices_is_found(gpu: PretendedGPU) -> None:
    here, there = torch.ones(4), torch.ones(4, device=CUDA)
    with pytest.raises(DataDependentOutputException):
        there.sum().item()
    with pytest.raises(DynamicOutputShapeException):
        there[there > 0]
    with pytest.raises(FakeTensorDeviceMismatchError):
        here + there
    gpu.hurries = True
    copies: tuple[Callable[[], Tensor], ...] = (there.cpu, here.cuda, lambda: there.copy_(here))
    for copy in copies:
        with pytest.raises(Waited):
            copy()
    assert here.to(CUDA, non_blocking=True).device == CUDA
