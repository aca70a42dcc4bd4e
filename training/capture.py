"""Functions of tensors as CUDA graphs, which a GPU runs as a whole, without waiting for the program.

A step launches hundreds of small operations one by one, and a GPU often has to wait for the next; a
graph gives it all of them at once. A graph is replayed on the memory that it was captured with.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Plain calls before the capture: what a first run prepares, such as the choices of a compiler or a
# library, would be captured too, or cannot be.
WARM_UPS = 3

Function = Callable[..., tuple[Tensor, ...]]


class Graph(NamedTuple):
    """A captured call, which computes ``outputs`` from ``inputs``; their memory stays the same."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Captured:
    """A function as CUDA graphs, one for each combination of its arguments' shapes.

    Args:
        function: takes tensors on the current GPU. It changes other tensors only in place and on the
            GPU, and never waits for the GPU. Numbers from the host stay as they were at the capture.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._graphs: dict[tuple[torch.Size, ...], Graph] = {}
        self._stream = torch.cuda.Stream()  # nothing can be captured on the default stream
        self._pool = torch.cuda.graph_pool_handle()  # shared: the graphs never run at the same time

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Call the function; the next call with the same shapes may overwrite the result."""
        shapes = tuple(argument.shape for argument in arguments)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM_UPS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                outputs = self._function(*arguments)
            torch.cuda.current_stream().wait_stream(self._stream)
            return outputs
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(arguments)
        graph, inputs, outputs = self._graphs[shapes]
        for own, argument in zip(inputs, arguments, strict=True):
            own.copy_(argument)
        graph.replay()
        return outputs

    def _capture(self, arguments: tuple[Tensor, ...]) -> Graph:
        inputs = tuple(argument.clone() for argument in arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outputs = self._function(*inputs)
        return Graph(graph, inputs, outputs)
