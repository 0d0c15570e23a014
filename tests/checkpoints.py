"""States of a run cut over ranks, and ranks that save them, all in one process."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.sink import CheckpointSink
from model.checkpoint.state import PARTS, Part, Piece, RankState, random_state
from model.checkpoint.writer import CheckpointWriter
from tests.tiny_stage import stage

Whole = Mapping[Part, Mapping[str, Tensor]]


def tensors(step: int, size: int = 6) -> dict[Part, dict[str, Tensor]]:
    """A run's tensors at a step: a vector without values, a scalar, views, two types."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(3, size, generator=generator)
    return {
        "model": {"a.weight": torch.randn(size, 4, generator=generator), "a.bias": torch.zeros(0), "scale": rows[0, 0]},
        "ema": {"a.weight": torch.randn(4, size, generator=generator).T, "a.bias": torch.zeros(0)},
        "optimizer": {f"row:{place}": row.bfloat16() if place else row for place, row in enumerate(rows.unbind())},
    }


def cut(whole: Whole, step: int, rank: int = 0, world_size: int = 1) -> RankState:
    """One rank's state; where each tensor is cut depends on its name alone, and some ranks get nothing of it."""
    return RankState(
        step=step,
        rank=rank,
        world_size=world_size,
        tensors={
            part: dict(_pieces(part, whole[part], rank, world_size)) if world_size > 1 else _wholes(whole[part])
            for part in PARTS
        },
        random=random_state(),
        loader={"position": 8 * step},
        inputs={"data": "d1"},
        recipe=stage(),
    )


def state(step: int = 5, size: int = 6) -> RankState:
    """Of a single rank."""
    return cut(tensors(step, size), step)


def save(root: Path, state: RankState, *, keep: int) -> Path:
    """A single rank's checkpoint, durable on return."""
    writer = CheckpointWriter(root, keep=keep)
    writer.save(state)
    folder = writer.wait()
    assert folder is not None
    return folder


def save_cut(
    root: Path,
    whole: Whole,
    step: int,
    world_size: int,
    *,
    keep: int = 2,
    sinks: Sequence[CheckpointSink] | None = None,
) -> Path:
    """The same by that many ranks."""
    writers = gang(root, world_size, keep=keep, sinks=sinks)
    for rank, writer in enumerate(writers):
        writer.save(cut(whole, step, rank, world_size))
    folders = [writer.wait() for writer in writers]
    assert folders == [root / f"step-{step:08d}"] * world_size
    return root / f"step-{step:08d}"


def gang(
    root: Path, world_size: int, *, keep: int = 2, sinks: Sequence[CheckpointSink] | None = None, patience: float = 60.0
) -> list[CheckpointWriter]:
    return [
        CheckpointWriter(
            root,
            keep=keep,
            rank=rank,
            world_size=world_size,
            sink=None if sinks is None else sinks[rank],
            patience=patience,
        )
        for rank in range(world_size)
    ]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[x].dtype == b[x].dtype and torch.equal(a[x], b[x]) for x in a)


def _wholes(whole: Mapping[str, Tensor]) -> dict[str, Piece]:
    return {name: Piece.whole(tensor) for name, tensor in whole.items()}


def _pieces(part: str, whole: Mapping[str, Tensor], rank: int, world_size: int) -> list[tuple[str, Piece]]:
    pieces: list[tuple[str, Piece]] = []
    for name, tensor in whole.items():
        size = tensor.numel()
        draw = random.Random(f"{part} {name} {world_size}")
        cuts = [0, *sorted(draw.randint(0, size) for _ in range(world_size - 1)), size]
        if size == 0 and rank:
            continue
        start, stop = cuts[rank], cuts[rank + 1]
        pieces.append((name, Piece(tensor.shape, start, tensor.reshape(-1)[start:stop])))
    return pieces
