"""The ranks of a run and the DeepSpeed engine over them: the only door to DeepSpeed.

It owns process groups, the DeepSpeed settings derived from a recipe, gradient reduction and clipping. It knows
nothing of what is trained; where DeepSpeed keeps which values is `fragments`'.
"""

import logging
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.config import TrainingConfig
from model.optim.optimizer import StageOptimizer
from model.training import fragments
from monitoring.stopwatch import Stopwatch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # pyright: ignore[reportMissingTypeStubs]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than rank 0 takes to write the largest checkpoint while the others wait (DeepSpeed's default is 10)."""

PLAIN_LINEAR = torch.nn.functional.linear
"""ZeRO 3 puts its own in this one's place, for all networks of the process and for good."""

GROUP_VALUES = 1 << 28
"""Values of a parameter group. ZeRO copies the gradients of one group at a time to fp32: 1 GiB over the ranks."""


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


def meet() -> None:
    """Wait for the other ranks."""
    torch.distributed.barrier()  # pyright: ignore[reportUnknownMemberType]


def leave() -> None:
    """Wait for the other ranks, then part; the process is as it was before."""
    meet()
    torch.distributed.destroy_process_group()
    torch.nn.functional.linear = PLAIN_LINEAR


def deepspeed_config(training: TrainingConfig, parameters: int) -> dict[str, object]:
    """DeepSpeed's settings, all derived: nobody writes a second file that could disagree with the recipe.

    Args:
        parameters: values that the network trains.
    """
    settings: dict[str, object] = {
        # Ranks that share a clip count as ones of their own: gradients are averaged over all of them.
        "train_batch_size": training.global_batch_size * training.sequence_parallel,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "zero_optimization": {
            "stage": training.zero_stage,
            "reduce_bucket_size": min(parameters, GROUP_VALUES),
            # Below this ZeRO 3 keeps a parameter whole on every rank, out of the optimizer's sight.
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,  # `Fragment`s make AdaFactor exact there, and tests hold it to that
        # Said even where it is off, since the default is 1.0: in fp32 at stage 0 DeepSpeed clips but tells no norm.
        "gradient_clipping": 0.0 if _is_plain(training) else training.gradient_clip,
        "steps_per_print": None,
    }
    if training.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        if training.gradient_accumulation_steps > 1:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """The network's parameters in groups of at most GROUP_VALUES values, or of one."""
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in network.parameters():
        if groups[-1] and sum(p.numel() for p in groups[-1]) + parameter.numel() > GROUP_VALUES:
            groups.append([])
        groups[-1].append(parameter)
    return [{"params": group} for group in groups]


class ParallelEngine:
    """A network and its optimizer, trained by all ranks together; gradients are means over the global batch.

    At precision bf16 the network's weights become bf16, and it must take and give fp32 as it is.
    """

    def __init__(self, network: nn.Module, optimizer: StageOptimizer, training: TrainingConfig, place: Place) -> None:
        self.network = network.to(place.device)
        self.place = place
        self.gradient_clip = training.gradient_clip
        self._plain = _is_plain(training)
        self._parameters = list(network.parameters())
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        originals = {} if training.precision == "fp32" else _copies(network)
        parameters = sum(parameter.numel() for parameter in self._parameters)
        self._engine = _deepspeed().initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_config(training, parameters),
            dist_init_required=False,
        )[0]
        # A single rank has nothing to reduce; at stage 0 DeepSpeed would copy every gradient into a bucket and back.
        self._engine.enable_backward_allreduce = place.world_size > 1 or training.zero_stage > 0
        held = fragments.held_by(self._engine.optimizer, self._parameters, names, training)
        for run in (run for runs in held.values() for run in runs if run.name in originals):
            run.values.copy_(originals[run.name].view(-1)[run.start : run.stop])
        group = _world() if place.world_size > 1 else None
        optimizer.hold(held, group)
        self.masters = fragments.kept_by(held, training, place.rank)
        """What this rank averages and saves: over all ranks every value once."""

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; the last micro-batch of a step also reduces them over ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, moves nothing

    def step(self) -> float:
        """Clip, move the parameters and forget the gradients; returns the gradients' norm before clipping.

        Where that is not finite nothing has moved.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "step before the last micro-batch of the global batch"
        if not self._plain:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = self._clip()
        if math.isfinite(norm):
            self._engine.step()
        return norm

    def gather(self, *values: float) -> list[list[float]]:
        """A few numbers of each rank, in the ranks' order; every rank gets them."""
        if self.place.world_size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.place.device)
        everybodys = [torch.empty_like(own) for _ in range(self.place.world_size)]
        torch.distributed.all_gather(everybodys, own)  # pyright: ignore[reportUnknownMemberType]
        return [[float(value) for value in row.cpu()] for row in everybodys]

    def stopwatch(self) -> Stopwatch:
        """Of this rank's own time: its device's, where that works behind the host."""
        if self.place.device.type != "cuda":
            return Stopwatch()
        return Stopwatch(lambda: torch.cuda.Event(enable_timing=True))

    def _clip(self) -> float:
        # Reducing gives parameters that took no part a gradient of zero; a single rank must do the same.
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return torch.nn.utils.clip_grad_norm_(self._parameters, self.gradient_clip).item()


def _is_plain(training: TrainingConfig) -> bool:
    """Whether DeepSpeed leaves optimizer and parameters as they are, so that clipping is ours."""
    return training.zero_stage == 0 and training.precision == "fp32"


def _copies(network: nn.Module) -> dict[str, Tensor]:
    """The weights in fp32 in host memory: the masters begin from them, not from their bf16 rounding."""
    return {name: parameter.detach().cpu().clone() for name, parameter in network.named_parameters()}


def _world() -> ProcessGroup:
    world = torch.distributed.group.WORLD
    assert world is not None, "join() comes first"
    return world


def _deepspeed() -> Any:
    """The library without its half-typed signatures."""
    return deepspeed
