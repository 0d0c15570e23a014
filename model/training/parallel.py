"""The ranks of a run and the DeepSpeed engine over them: the only door to DeepSpeed.

It owns process groups, the DeepSpeed settings derived from a recipe, gradient reduction and clipping. It knows
nothing of what is trained.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.config import TrainingConfig

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # pyright: ignore[reportMissingTypeStubs]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than rank 0 takes to write the largest checkpoint while the others wait (DeepSpeed's default is 10)."""


@dataclass(slots=True, frozen=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def read_place() -> Place:
    """From the environment that torchrun sets."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set: start ranks with torchrun, also a single one")
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def join(training: TrainingConfig) -> Place:
    """Meet the other ranks; every rank calls it once, before anything collective."""
    place = read_place()
    if place.world_size != training.world_size:
        raise ValueError(
            f"{place.world_size} ranks were started, the recipe says training.world_size {training.world_size};"
            f" start {training.world_size}"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    else:
        # On the CPU DeepSpeed would compile a shared-memory kernel for minutes, and hang on a killed compile's lock.
        cast(Any, deepspeed.ops).__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    _deepspeed().init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return place


def leave() -> None:
    """Wait for the other ranks, then part."""
    torch.distributed.barrier()  # pyright: ignore[reportUnknownMemberType]
    torch.distributed.destroy_process_group()


def deepspeed_config(training: TrainingConfig) -> dict[str, object]:
    """DeepSpeed's settings, all derived: nobody writes a second file that could disagree with the recipe."""
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "zero_optimization": {"stage": training.zero_stage},
        # Off, and said so since the default is 1.0: at stage 0 DeepSpeed clips but does not tell the norm.
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }


class ParallelEngine:
    """A network and its optimizer, trained by all ranks together; gradients are means over the global batch."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, training: TrainingConfig, place: Place
    ) -> None:
        self.network = network.to(place.device)
        self.place = place
        self.gradient_clip = training.gradient_clip
        self._parameters = list(network.parameters())
        self._engine = _deepspeed().initialize(
            model=network, optimizer=optimizer, config=deepspeed_config(training), dist_init_required=False
        )[0]
        # A single rank has nothing to reduce; DeepSpeed would copy every gradient into a bucket and back.
        self._engine.enable_backward_allreduce = place.world_size > 1

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; the last micro-batch of a step also reduces them over ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, moves nothing

    def clip_gradients(self) -> float:
        """Scale the reduced gradients down to the recipe's norm; returns the norm before."""
        # Reducing gives parameters that took no part a gradient of zero; a single rank must do the same.
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return torch.nn.utils.clip_grad_norm_(self._parameters, self.gradient_clip).item()

    def step(self) -> None:
        """Move the parameters and forget the gradients."""
        assert self._engine.is_gradient_accumulation_boundary(), "step before the last micro-batch of the global batch"
        self._engine.step()

    def mean(self, *values: float) -> list[float]:
        """Means over ranks of a few numbers; every rank gets them."""
        if self.place.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.place.device)
        torch.distributed.all_reduce(tensor)  # pyright: ignore[reportUnknownMemberType]
        return [float(total) / self.place.world_size for total in tensor]


def _deepspeed() -> Any:
    """The library without its half-typed signatures."""
    return deepspeed
