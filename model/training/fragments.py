"""Which run of which parameter each rank holds, read off DeepSpeed's optimizers.

ZeRO 0 leaves parameters whole on every rank, 1 and 2 lay them end to end and cut that into a partition a rank, 3 cuts
each parameter. It owns these layouts; it knows nothing of steps, optimizers' rules or files.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from model.config import TrainingConfig
from model.optim.fragment import Fragment

Held = Mapping[Tensor, Sequence[Fragment]]
"""Each tensor of the optimizer's parameter groups, and the runs that it is made of."""


def held_by(
    optimizer: Any, parameters: Sequence[nn.Parameter], names: Mapping[int, str], training: TrainingConfig
) -> Held:
    """What the optimizer of this rank steps.

    Args:
        optimizer: what DeepSpeed made of ours.
        names: of the network's parameters, by their `id`.
    """
    if training.zero_stage == 0 and training.precision == "fp32":
        return {p: [_whole(names[id(p)], p)] for p in parameters}
    if training.zero_stage == 0:
        weights: list[Tensor] = list(chain(*optimizer.fp16_groups))
        masters: list[Tensor] = list(chain(*optimizer.fp32_groups))
        return {master: [_whole(names[id(p)], master)] for p, master in zip(weights, masters, strict=True)}
    if training.zero_stage == 3:
        return _cut_one_by_one(optimizer, names)
    return {
        flat: [
            Fragment(names[id(p)], p.shape, where.lp_fragment_address.start, where.hp_fragment.detach())
            for p in parameters
            if (where := p._hp_mapping) is not None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUnknownMemberType]
        ]
        for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    }


def kept_by(held: Held, training: TrainingConfig, rank: int) -> list[Fragment]:
    """What this rank averages and saves. Where all ranks hold all, each keeps an even share."""
    runs = [run for runs in held.values() for run in runs]
    if training.zero_stage > 0:
        return runs
    total = sum(run.values.numel() for run in runs)
    first, last = total * rank // training.world_size, total * (rank + 1) // training.world_size
    kept: list[Fragment] = []
    at = 0
    for run in runs:
        size = run.values.numel()
        begin, end = max(first - at, 0), min(last - at, size)
        if begin < end:
            kept.append(Fragment(run.name, run.shape, begin, run.values[begin:end]))
        at += size
    return kept


def _whole(name: str, tensor: Tensor) -> Fragment:
    return Fragment(name, tensor.shape, 0, tensor.detach().view(-1))


def _cut_one_by_one(optimizer: Any, names: Mapping[int, str]) -> Held:
    """ZeRO 3: rank r holds the r-th of equal runs of every parameter, the last filled up with zeros."""
    rank = torch.distributed.get_rank()
    held: dict[Tensor, Sequence[Fragment]] = {}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        runs: list[Fragment] = []
        at = 0
        for p in group:
            run = p.partition_numel()
            start = rank * run
            size = min(run, math.prod(p.ds_shape) - start)
            if size > 0:
                values = flat.detach()[at : at + size]
                runs.append(Fragment(names[id(p)], p.ds_shape, start, values))
            at += run
        held[flat] = runs
    return held
