"""Real ranks for a test: processes that meet over gloo, forked from one that has imported what is slow to import.

A rank that torchrun starts spends seconds on those imports; tests of how gangs are started use torchrun all the same.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

SLOW_TO_IMPORT = ["model.training.prepare", "transformers.models.bert.modeling_bert"]


def run_ranks(world_size: int, target: Callable[..., None], *args: Any) -> None:
    """Call `target(*args)` on each rank, under torchrun's variables; a rank's error is raised here.

    Args:
        target: a function of a module's top level.
    """
    multiprocessing.set_forkserver_preload(SLOW_TO_IMPORT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_rank, (world_size, port, target, args), world_size, start_method="forkserver")


def _rank(rank: int, world_size: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    target(*args)
