"""Functions of tensors as CUDA graphs: a GPU runs one as a whole, and does not wait for the program.

A step starts hundreds of small operations one by one, for which a GPU often has to wait; of a graph it
has them all at once. A graph is captured, and replayed, on the same memory.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Before the capture: what is prepared at a first run, such as a compiler's or a library's choices, would
# be captured too, or cannot be.
WARM_UPS = 3

Function = Callable[..., tuple[Tensor, ...]]


class Graph(NamedTuple):
    """A captured call: it computes ``outputs`` from ``inputs``, all of which keep their places."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Captured:
    """A function as CUDA graphs, one for each combination of its arguments' shapes.

    Args:
        function: of tensors on the current GPU. All it does to others is done in place, on the GPU, and
            it does not wait for the GPU; numbers of the host are in the graph as they were.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._graphs: dict[tuple[torch.Size, ...], Graph] = {}
        self._stream = torch.cuda.Stream()  # nothing is captured on the one that all else uses
        self._pool = torch.cuda.graph_pool_handle()  # the graphs never run at the same time

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """What the function gives; it is overwritten by the next call with the same shapes."""
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
