"""Prefetching: batches made ahead by processes of their own, in the order they were asked for.

It owns the processes, by torch's DataLoader; how a batch is made, and which one comes when, it does not know.
"""

import atexit
import os
from collections.abc import Callable, Generator, Iterable
from typing import Any, cast

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from model.data.batch import ClipBatch, ClipRequest

AHEAD = 2
"""Batches that each process holds ready."""


class _Made(Dataset[ClipBatch]):
    """`make` as the data set that a DataLoader wants: an item is what was asked for."""

    def __init__(self, make: Callable[[ClipRequest], ClipBatch]) -> None:
        self._make = make

    def __getitem__(self, index: ClipRequest) -> ClipBatch:
        return self._make(index)


def prefetched(
    make: Callable[[ClipRequest], ClipBatch], asked: Iterable[ClipRequest], workers: int
) -> Generator[ClipBatch, None, None]:
    """`map(make, asked)` by `workers` processes, so that the order and every byte are the same.

    What `make` raises is raised here; a process that dies is a RuntimeError that names it. Closing ends them.
    """
    loader: DataLoader[ClipBatch] = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=cast(Any, asked),
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=cast(Any, _as_it_is),
        worker_init_fn=_settle,
        # Fork would copy locks that threads of this process hold, and CUDA does not survive it.
        multiprocessing_context="spawn",
        pin_memory=torch.cuda.is_available(),
        # Of its own, or a run with workers would draw other numbers than one without.
        generator=torch.Generator(),
    )
    yield from loader


def _as_it_is(batch: ClipBatch) -> ClipBatch:
    return batch


def _settle(worker: int) -> None:
    """One thread a process, and out of the rank's process group: a SIGTERM there asks for a last step, with its data.

    A process whose rank is gone ends by itself.
    """
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    # Without taking Python down: that kills the thread which sends batches within C++, and aborts the process.
    atexit.register(os._exit, 0)
