"""What rank 0 tells the world of a run while it trains: progress lines and Prometheus metrics.

It knows nothing of how a step is done.
"""

import time
from pathlib import Path

from model.recipe import StageRecipe
from model.training.run import ProgressLine, RunFolders, append_progress, rewind_progress
from monitoring import metrics


class Journal:
    """Notes every step; writes a progress line every `log_every` steps and at the last."""

    def __init__(self, recipe: StageRecipe, folders: RunFolders, *, first_step: int, metrics_port: int) -> None:
        self.training = recipe.training
        self.folders = folders
        self._exporter = metrics.start_exporter(metrics_port)
        folders.metrics_port.write_text(str(self._exporter.port))
        world_size = str(recipe.training.world_size)
        metrics.set_info(metrics.TRAINING_STAGE_INFO, stage=recipe.name, task=recipe.task, world_size=world_size)
        self._began = time.monotonic() - rewind_progress(folders.progress, first_step)
        self._losses: list[float] = []
        self._seconds: list[float] = []

    def note(self, step: int, *, loss: float, grad_norm: float, learning_rate: float, seconds: float) -> None:
        """A step is done, the `step`-th of the run."""
        metrics.TRAINING_LOSS.set(loss)
        metrics.TRAINING_GRAD_NORM.set(grad_norm)
        metrics.TRAINING_LEARNING_RATE.set(learning_rate)
        metrics.TRAINING_STEPS_TOTAL.inc()
        metrics.TRAINING_SAMPLES_TOTAL.inc(self.training.global_batch_size)
        metrics.TRAINING_STEP_SECONDS.observe(seconds)
        self._losses.append(loss)
        self._seconds.append(seconds)
        if step % self.training.log_every and step != self.training.total_steps:
            return
        mean_seconds = sum(self._seconds) / len(self._seconds)
        line = ProgressLine(
            step=step,
            total_steps=self.training.total_steps,
            loss=sum(self._losses) / len(self._losses),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            step_seconds=mean_seconds,
            samples_per_second=self.training.global_batch_size / mean_seconds,
            elapsed_seconds=time.monotonic() - self._began,
        )
        append_progress(self.folders.progress, line)
        self._losses.clear()
        self._seconds.clear()

    def note_checkpoint(self, folder: Path, seconds: float) -> None:
        metrics.TRAINING_CHECKPOINT_SECONDS.observe(seconds)
        metrics.TRAINING_LAST_CHECKPOINT_TIMESTAMP_SECONDS.set(folder.stat().st_mtime)

    def close(self) -> None:
        self._exporter.close()
        self.folders.metrics_port.unlink()
