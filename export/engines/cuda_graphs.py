"""Functions of tensors, recorded as CUDA graphs: one recording a shape, replayed without a launch from Python.

It owns recordings, their buffers and how many there are; it knows nothing of what the function computes.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

Key = tuple[tuple[torch.Size, torch.dtype], ...]
WARM_UP = 3
"""Calls before the recording, so that what a library does once (plans, workspaces, compilation) is not recorded."""


@dataclass(slots=True)
class _Recording:
    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphs:
    """`function` of tensors on one GPU, each shape recorded at its first call.

    What the function reads beside its inputs (weights) is read where it lay when it was recorded: change it in place.
    """

    def __init__(self, function: Callable[..., Tensor], *, limit: int = 16) -> None:
        """`limit` recordings at most, each with buffers of its own; the one unused longest goes."""
        self._function = function
        self._limit = limit
        self._recordings: OrderedDict[Key, _Recording] = OrderedDict()
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((each.shape, each.dtype) for each in inputs)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(inputs)
            if len(self._recordings) > self._limit:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        for buffer, value in zip(recording.inputs, inputs, strict=True):
            buffer.copy_(value)
        recording.graph.replay()
        return recording.output.clone()  # the next replay of any recording may write there

    def forget(self) -> None:
        """Drop every recording: what they read has moved."""
        self._recordings.clear()

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        cuda = cast(Any, torch.cuda)
        buffers = tuple(each.clone() for each in inputs)
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):
            for _ in range(WARM_UP):
                self._function(*buffers)
        cuda.current_stream().wait_stream(aside)
        graph = cuda.CUDAGraph()
        self._pool = self._pool or cuda.graph_pool_handle()
        with cuda.graph(graph, pool=self._pool):
            output = self._function(*buffers)
        return _Recording(graph, buffers, output)
