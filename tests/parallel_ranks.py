"""A rank of test_parallel: each case trains on all of them and alone, and tells the difference."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import OptimizerConfig, TrainingConfig
from model.optim.choice import make_optimizer
from model.optim.ema import Ema
from model.training.parallel import ParallelEngine, Place, join, leave, parameter_groups

STEPS = 6
ROWS = 24
"""Of a global batch: 2 micro-batches on each of 1, 2, 3 or 4 ranks."""


class Odd(nn.Module):
    """Parameters of many shapes, none of which a partition's border respects."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def odd(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.3)

        self.first, self.bias = odd(7, 13), odd(13)
        self.cube, self.scalar = odd(13, 3, 5), odd(1)
        self.last = odd(15, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x.to(self.first.dtype) @ self.first + self.bias)
        h = torch.tanh((h @ self.cube.flatten(1)) * self.scalar)
        return (h @ self.last).to(x.dtype)


def rows(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(STEPS, ROWS, 7, generator=generator), torch.randn(STEPS, ROWS, 11, generator=generator) * 9


def alone(training: TrainingConfig, optimizer: OptimizerConfig, seed: int) -> tuple[dict[str, Tensor], list[float]]:
    """The same training by plain torch in one process, and the gradient norms."""
    network = Odd(seed)
    plain = make_optimizer(network.parameters(), optimizer)
    norms: list[float] = []
    for x, y in zip(*rows(seed), strict=True):
        network.zero_grad()
        nn.functional.mse_loss(network(x), y).backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), training.gradient_clip).item())
        plain.step()
    return {name: p.detach() for name, p in network.named_parameters()}, norms


def together(
    training: TrainingConfig, optimizer: OptimizerConfig, seed: int, place: Place
) -> tuple[ParallelEngine, Any, Ema, list[float]]:
    network = Odd(seed)
    ours = make_optimizer(parameter_groups(network), optimizer)
    engine = ParallelEngine(network, ours, training, place)
    ema = Ema(engine.masters, 0.9)
    norms: list[float] = []
    for number, (x, y) in enumerate(zip(*rows(seed), strict=True)):
        for part in range(training.gradient_accumulation_steps):
            first = (part * place.world_size + place.rank) * training.micro_batch_size
            own = slice(first, first + training.micro_batch_size)
            engine.backward(nn.functional.mse_loss(engine(x[own]), y[own]))
        norms.append(engine.step())
        ema.update(number)
    return engine, ours, ema, norms


def gathered(pieces: Any) -> dict[str, Tensor]:
    """Whole tensors of all ranks' pieces; every value must come once."""
    own = [(piece.name, tuple(piece.shape), piece.start, piece.values.detach().float()) for piece in pieces]
    lists: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, own)
    whole: dict[str, Tensor] = {}
    for name, shape, start, values in (piece for pieces in lists for piece in pieces):
        flat = whole.setdefault(name, torch.full(shape, float("nan"))).view(-1)
        assert flat[start : start + len(values)].isnan().all(), f"{name} comes twice"
        flat[start : start + len(values)] = values
    assert not any(x.isnan().any() for x in whole.values())
    return whole


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return max((a[name] - b[name]).abs().max().item() for name in a)


def case(settings: dict[str, Any], place: Place) -> dict[str, Any]:
    world = place.world_size
    training = TrainingConfig(
        steps=STEPS,
        global_batch_size=ROWS,
        micro_batch_size=ROWS // world // settings.pop("accumulate"),
        world_size=world,
        gradient_clip=settings.pop("clip", 1.0),
        zero_stage=settings.pop("zero"),
        precision=settings.pop("precision", "fp32"),
    )
    seed = settings.pop("seed")
    optimizer = OptimizerConfig(lr=0.02, **settings)
    expected, expected_norms = alone(training, optimizer, seed)
    engine, ours, ema, norms = together(training, optimizer, seed, place)
    masters = gathered(engine.masters)
    begun = {name: p.detach() for name, p in Odd(seed).named_parameters()}
    state = ours.state_of(engine.masters)
    whole = gathered(state)
    return {
        "difference": difference(masters, expected),
        "moved": difference(begun, expected),
        "norms": max(abs(a - b) / b for a, b in zip(norms, expected_norms, strict=True)),
        "bytes": sum(piece.values.numel() * piece.values.element_size() for piece in state),
        "parts": sorted({name.partition(":")[0] for name in whole}),
        "averages": sorted(gathered(ema.averages)) == sorted(masters),
        "weights": _weights_follow(engine, masters, training),
    }


def _weights_follow(engine: ParallelEngine, masters: dict[str, Tensor], training: TrainingConfig) -> bool:
    """Whether what the network computes with is what the masters say, in its precision."""
    if training.zero_stage == 3:
        return True  # weights lie in pieces
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    return all(
        p.dtype == dtype and torch.equal(p.detach(), masters[name].to(dtype))
        for name, p in engine.network.named_parameters()
    )


def tell(cases: list[dict[str, Any]], out: Path) -> None:
    world = int(os.environ["WORLD_SIZE"])
    place = join(TrainingConfig(steps=1, global_batch_size=world, micro_batch_size=1, world_size=world))
    results = [case(dict(settings), place) for settings in cases]
    if place.is_first:
        out.write_text(json.dumps(results))
    leave()
