"""What rank 0 tells the world of a run while it trains: progress lines, the ledger's lines and Prometheus metrics.

It knows nothing of how a step is done, and does not say what time is spent on: the loop does, to the ledger.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.network.cost import Cost
from model.recipe import StageRecipe
from model.training.run import ProgressLine, RunFolders, append_progress, rewind_progress
from monitoring import metrics
from monitoring.goodput import ACCOUNTS, Ledger, straggler_ratio, utilization


@dataclass(slots=True)
class _Interval:
    """The steps since the last progress line."""

    losses: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])
    costs: list[Cost] = field(default_factory=list[Cost])
    rank_seconds: list[Sequence[float]] = field(default_factory=list[Sequence[float]])

    @property
    def straggler_ratio(self) -> float | None:
        ranks = [sum(seconds) for seconds in zip(*self.rank_seconds, strict=True)]
        return straggler_ratio(ranks) if len(ranks) > 1 else None


class Journal:
    """Notes every step; writes a progress line every `log_every` steps and at the last."""

    def __init__(
        self,
        recipe: StageRecipe,
        folders: RunFolders,
        ledger: Ledger,
        *,
        first_step: int,
        metrics_port: int,
        peak_flops: float | None = None,
    ) -> None:
        """
        Args:
            peak_flops: what all ranks together could do in a second; None where the hardware's is unknown.
        """
        self.training = recipe.training
        self.folders = folders
        self._ledger = ledger
        self._peak_flops = peak_flops
        self._exporter = metrics.start_exporter(metrics_port)
        folders.metrics_port.write_text(str(self._exporter.port))
        world_size = str(recipe.training.world_size)
        metrics.set_info(metrics.TRAINING_STAGE_INFO, stage=recipe.name, task=recipe.task, world_size=world_size)
        self._began = time.monotonic() - rewind_progress(folders.progress, first_step)
        self._interval = _Interval()
        self._counted = dict.fromkeys(ACCOUNTS, 0)
        self._waited = 0
        self._save_began = 0.0
        self._durable: Path | None = None
        ledger.resume(first_step)
        self._show_ledger()

    def note(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        seconds: float,
        cost: Cost | None = None,
        rank_seconds: Sequence[float] = (),
    ) -> None:
        """A step is done, the `step`-th of the run.

        Args:
            seconds: from its beginning to its end, its data included.
            cost: of all ranks together.
            rank_seconds: each rank's own time in it, waits for the others left out.
        """
        metrics.TRAINING_LOSS.set(loss)
        metrics.TRAINING_GRAD_NORM.set(grad_norm)
        metrics.TRAINING_LEARNING_RATE.set(learning_rate)
        metrics.TRAINING_STEPS_TOTAL.inc()
        metrics.TRAINING_SAMPLES_TOTAL.inc(self.training.global_batch_size)
        metrics.TRAINING_STEP_SECONDS.observe(seconds)
        self._interval.losses.append(loss)
        self._interval.seconds.append(seconds)
        self._interval.rank_seconds.append(rank_seconds)
        if cost:
            self._interval.costs.append(cost)
            metrics.TRAINING_TOKENS_TOTAL.inc(cost.tokens)
        if step % self.training.log_every == 0 or step == self.training.total_steps:
            self._log(step, grad_norm, learning_rate)

    def note_save(self, step: int) -> None:
        """The state after `step` steps is being saved; a run that resumes from it will ask where its time ended."""
        self._save_began = time.time()
        self._ledger.write(step)
        self._show_ledger()

    def note_durable(self, folder: Path | None) -> None:
        """The checkpoint that was written last, told after every step: written behind it, it is durable some time."""
        if folder is None or folder == self._durable:
            return
        self._durable, written = folder, folder.stat().st_mtime
        metrics.TRAINING_CHECKPOINT_SECONDS.observe(max(0.0, written - self._save_began))
        metrics.TRAINING_LAST_CHECKPOINT_TIMESTAMP_SECONDS.set(written)

    def close(self) -> None:
        self._ledger.close()
        self._exporter.close()
        self.folders.metrics_port.unlink()

    def _log(self, step: int, grad_norm: float, learning_rate: float) -> None:
        interval, self._interval = self._interval, _Interval()
        count, seconds = len(interval.losses), sum(interval.seconds)
        mean_seconds = seconds / count
        self._ledger.write(step)
        self._show_ledger()
        line = ProgressLine(
            step=step,
            total_steps=self.training.total_steps,
            loss=sum(interval.losses) / count,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            step_seconds=mean_seconds,
            samples_per_second=self.training.global_batch_size / mean_seconds,
            elapsed_seconds=time.monotonic() - self._began,
            data_wait_seconds=self._take_wait() / count,
            tokens_per_second=sum(cost.tokens for cost in interval.costs) / seconds if interval.costs else None,
            mfu=self._utilization([cost.model_flops for cost in interval.costs], seconds),
            hfu=self._utilization([cost.hardware_flops for cost in interval.costs], seconds),
            straggler_ratio=interval.straggler_ratio,
            spent_seconds=self._ledger.booked.seconds,
        )
        append_progress(self.folders.progress, line)
        for metric, value in (
            (metrics.TRAINING_MFU_RATIO, line.mfu),
            (metrics.TRAINING_HFU_RATIO, line.hfu),
            (metrics.TRAINING_STRAGGLER_RATIO, line.straggler_ratio),
        ):
            if value is not None:
                metric.set(value)

    def _utilization(self, flops: Sequence[float], seconds: float) -> float | None:
        return utilization(sum(flops), seconds, self._peak_flops) if flops and self._peak_flops else None

    def _take_wait(self) -> float:
        """Seconds booked to data since the last call."""
        waited, self._waited = self._waited, self._ledger.own["data_wait"]
        return (self._waited - waited) / 1e9

    def _show_ledger(self) -> None:
        ledger = self._ledger
        for account, nanoseconds in ledger.own.items():
            metrics.TRAINING_TIME_SECONDS_TOTAL.labels(account=account).inc(
                (nanoseconds - self._counted[account]) / 1e9
            )
        self._counted = dict(ledger.own)
        if ledger.booked.goodput is not None:
            metrics.TRAINING_GOODPUT_RATIO.set(ledger.booked.goodput)
