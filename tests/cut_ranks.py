"""Ranks without DeepSpeed: random parameters laid end to end and cut at random places, stepped by 1 to 4 processes."""

import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.optim.adafactor import AdaFactor
from model.optim.fragment import Fragment
from tests.ranks import run_ranks

RANKS = 4
STEPS = 4


def differences(*, trials: int, seed: int) -> list[float]:
    """The largest difference from the uncut optimizer, of every trial on every number of ranks."""
    with TemporaryDirectory() as folder:
        run_ranks(RANKS, _rank, trials, seed, folder)
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def _rank(trials: int, seed: int, folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group(list(range(size))) for size in range(1, RANKS + 1)]
    found: list[float] = []
    for trial in range(trials):
        for size, group in enumerate(groups, start=1):
            if rank < size:
                found.append(_trial(random.Random(f"{seed}:{trial}:{size}"), rank, size, group))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def _trial(chance: random.Random, rank: int, size: int, group: Any) -> float:
    shapes = [
        tuple(chance.randint(1, 7) for _ in range(chance.choice((1, 2, 2, 2, 3)))) for _ in range(chance.randint(1, 6))
    ]
    numel = [math.prod(shape) for shape in shapes]
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    flat = torch.randn(sum(numel), generator=generator)
    gradients = torch.randn(STEPS, sum(numel), generator=generator) * 10.0 ** chance.randint(-3, 3)
    settings: dict[str, Any] = {"lr": 0.05, "beta1": 0.9, "beta2": 0.99, "clip_threshold": chance.choice((0.3, 1.0))}

    expected = flat.clone()
    parameters = [nn.Parameter(run.view(shape)) for run, shape in zip(expected.split(numel), shapes, strict=True)]
    plain = AdaFactor(parameters, **settings)
    for gradient in gradients:
        for parameter, run in zip(parameters, gradient.split(numel), strict=True):
            parameter.grad = run.view_as(parameter)
        plain.step()

    own, optimizer, first = _cut(flat, shapes, chance, rank, size, group, settings)
    for number, gradient in enumerate(gradients):
        if number == STEPS // 2:  # saved, cut otherwise, gone on
            whole = _gathered(optimizer.state_of(_runs(optimizer)), group, size)
            everything = _gathered(_runs(optimizer), group, size)
            flat = torch.cat([everything[str(place)] for place in range(len(shapes))])
            own, optimizer, first = _cut(flat, shapes, chance, rank, size, group, settings)
            optimizer.load_state(lambda name, start, stop, state=whole: state[name][start:stop], number)
        own.grad = gradient[first : first + own.numel()]
        optimizer.step()
    return (own.detach() - expected.detach()[first : first + own.numel()]).abs().max().item() if own.numel() else 0.0


def _cut(
    flat: Tensor, shapes: list[Any], chance: random.Random, rank: int, size: int, group: Any, settings: Any
) -> tuple[nn.Parameter, AdaFactor, int]:
    """This rank's run of `flat` between borders that all ranks draw alike."""
    borders = [0, *sorted(chance.randint(0, flat.numel()) for _ in range(size - 1)), flat.numel()]
    low, high = borders[rank], borders[rank + 1]
    own = nn.Parameter(flat[low:high].clone())
    runs: list[Fragment] = []
    at = 0
    for place, shape in enumerate(shapes):
        end = at + math.prod(shape)
        begin, stop = max(at, low), min(end, high)
        if begin < stop:
            runs.append(Fragment(str(place), torch.Size(shape), begin - at, own.detach()[begin - low : stop - low]))
        at = end
    optimizer = AdaFactor([own], **settings)
    optimizer.hold({own: runs}, group)
    return own, optimizer, low


def _runs(optimizer: AdaFactor) -> list[Fragment]:
    return [run for runs in optimizer._held.values() for run in runs]


def _gathered(pieces: list[Fragment], group: Any, size: int) -> dict[str, Tensor]:
    lists: list[Any] = [None] * size
    own = [(piece.name, math.prod(piece.shape), piece.start, piece.values.clone()) for piece in pieces]
    dist.all_gather_object(lists, own, group)
    whole: dict[str, Tensor] = {}
    for name, numel, start, values in (piece for pieces in lists for piece in pieces):
        whole.setdefault(name, torch.full((numel,), float("nan")))[start : start + len(values)] = values
    return whole
