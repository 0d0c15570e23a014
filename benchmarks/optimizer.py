"""AdaFactor on ranks that share its state, beside AdamW and a naive AdaFactor: `python -m benchmarks.optimizer`.

Two ranks, ZeRO 1, DeepSpeed; the network is XL (width 1152) cut to a depth of 2. Gradients are drawn, so that no
forward pass dilutes the figures: those of a rank are a fixed draw scaled anew for each step. All optimizers step in
turns in one run. AdamW is torch's. Naive is what DeepSpeed gives an AdaFactor that knows of no partitions: flat
vectors, for which the rule keeps a full second moment and clips over whatever shares the partition.

- `*_state_bytes_per_param`: optimizer state of all ranks, over the network's parameters.
- `*_max_weight_difference`: from the same AdaFactor in one process that nothing is cut for, after 50 steps;
  `largest_movement` is how far those steps moved a weight.
- `step_time_ratio_to_adamw`: seconds of the optimizer's own step, ours over AdamW's, median over turns of the ratio
  within a turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from benchmarks.contestants.model_step import Shape, ours
from benchmarks.result import report
from model.config import TrainingConfig
from model.optim.adafactor import AdaFactor
from model.optim.fragment import Fragment
from model.optim.optimizer import AdamW
from model.training.parallel import ParallelEngine, Place, join, leave, parameter_groups

ROOT = Path(__file__).parents[1]
RANKS = 2
STEPS = 50
LR = 2e-4
SHAPE = Shape(hidden=1152, depth=2, heads=18, frames=2, side=4, temporal_patch=2)


class Naive(AdaFactor):
    """AdaFactor that nobody tells what its flat tensors are made of."""

    def hold(self, held: Mapping[Tensor, Sequence[Fragment]], group: ProcessGroup | None = None) -> None:
        """As if it had never been told."""


class Weights(nn.Module):
    """A network's parameters alone; their gradient is whatever is asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.own = nn.ParameterList(network.parameters())

    def forward(self, directions: Sequence[Tensor], scale: float) -> Tensor:
        products = [torch.vdot(p.flatten(), d.flatten()) for p, d in zip(self.own, directions, strict=True)]
        return torch.stack(products).sum() * scale


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 steps; keeps nothing")
    parser.add_argument("--rank-into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = 3 if arguments.quick else STEPS
    if arguments.rank_into:
        rank(arguments.rank_into, steps)
        return
    with TemporaryDirectory() as folder:
        into = Path(folder) / "figures.json"
        own = ["-m", "benchmarks.optimizer", "--rank-into", str(into), *(["--quick"] if arguments.quick else [])]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        threads = str(max(1, (os.cpu_count() or 1) // RANKS))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
        subprocess.run([*torchrun, *own], env=environment, check=True)
        report("optimizer", json.loads(into.read_text()), quick=bool(arguments.quick))


def rank(into: Path, steps: int) -> None:
    """One rank's part; rank 0 writes the figures."""
    training = TrainingConfig(
        steps=steps, global_batch_size=RANKS, micro_batch_size=1, world_size=RANKS, zero_stage=1, gradient_clip=1e9
    )
    place = join(training)
    optimizers = {"ours": AdaFactor, "naive": Naive, "adamw": AdamW}
    runs = {name: Run(make, training, place) for name, make in optimizers.items()}
    directions = drawn(place.rank, runs["ours"].network)
    single = Weights(network())
    uncut = AdaFactor(single.parameters(), lr=LR)
    everybodys = [drawn(other, single) for other in range(RANKS)]

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(steps):
        scale = 1.0 + step % 7
        for name, run in runs.items():
            seconds[name].append(run.step(directions, scale))
        if place.is_first:
            for place_of, parameter in enumerate(single.own):
                parameter.grad = torch.stack([own[place_of] for own in everybodys]).mean(0) * scale
            uncut.step()
    state = {name: sum(row[0] for row in run.engine.gather(float(run.state_bytes()))) for name, run in runs.items()}
    if place.is_first:
        begun, count = list(network().parameters()), sum(p.numel() for p in single.parameters())
        figures = {f"{name}_state_bytes_per_param": state[name] / count for name in runs}
        figures["state_bytes_per_param"] = figures["ours_state_bytes_per_param"]
        for name in ("ours", "naive"):
            figures[f"{name}_max_weight_difference"] = apart(runs[name].network.own, single.own)
        figures["max_weight_difference"] = figures["ours_max_weight_difference"]
        figures["largest_movement"] = apart(begun, single.own)
        ratios = {name: [a / b for a, b in zip(seconds[name], seconds["adamw"], strict=True)] for name in runs}
        figures["step_time_ratio_to_adamw"] = statistics.median(ratios["ours"])
        figures["naive_step_time_ratio_to_adamw"] = statistics.median(ratios["naive"])
        figures["adamw_step_seconds"] = statistics.median(seconds["adamw"])
        figures |= {"parameters": count, "ranks": RANKS, "steps": steps}
        into.write_text(json.dumps(figures))
    leave()


class Run:
    """One optimizer at work, and its clock."""

    def __init__(self, make: Any, training: TrainingConfig, place: Place) -> None:
        self.network = Weights(network())
        self.optimizer = make(parameter_groups(self.network), lr=LR)
        self.engine = ParallelEngine(self.network, self.optimizer, training, place)
        self._seconds = 0.0
        plain = self.optimizer.step

        def timed(*args: Any) -> None:
            began = time.perf_counter()
            plain(*args)
            self._seconds += time.perf_counter() - began

        self.optimizer.step = timed

    def step(self, directions: Sequence[Tensor], scale: float) -> float:
        """Seconds that the optimizer itself took."""
        self._seconds = 0.0
        self.engine.backward(self.engine(directions, scale))
        self.engine.step()
        return self._seconds

    def state_bytes(self) -> int:
        if isinstance(self.optimizer, AdaFactor):
            return self.optimizer.state_bytes()
        states = cast(Sequence[Mapping[str, Tensor]], self.optimizer.state.values())
        return sum(x.numel() * x.element_size() for state in states for x in state.values() if x.ndim)


def network() -> nn.Module:
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    return ours(SHAPE).network


def drawn(rank: int, weights: Weights) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(p.shape, generator=generator) for p in weights.own]


def apart(some: Any, others: Any) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


if __name__ == "__main__":
    main()
