"""The training loop of a stage, the same for every task: the task is data in the batch.

It owns what happens between steps: notes, checkpoints, the end. Ranks are `parallel`'s, the step is `stage`'s, files
are `checkpoint`'s and `run`'s, and who started it is not known here.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from model.checkpoint.sink import CheckpointSink
from model.config import TrainingConfig
from model.optim.choice import learning_rate
from model.planning.gpu import gpu_of
from model.recipe import StageRecipe
from model.training import parallel
from model.training.heartbeat import Phase
from model.training.journal import Journal
from model.training.prepare import prepare
from model.training.run import RunFolders, exclusive
from model.training.stage import StageTraining
from monitoring.goodput import Ledger, process_age


def train(
    recipe: StageRecipe,
    folders: RunFolders,
    *,
    metrics_port: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[int, Phase], None] = lambda step, phase: None,
    sink: CheckpointSink | None = None,
) -> bool:
    """Train a stage, from its parent, from scratch, or on from the run folder's latest checkpoint.

    Every rank calls it. Where `should_stop` turns true on any rank, all finish that step and a checkpoint is written.
    `beat` is told the steps done and what comes next. Checkpoints go to `sink` as well, and an empty run folder goes
    on from there.

    Returns:
        True when all steps are done, False when it was stopped before.
    """
    training = recipe.training
    place = parallel.join(training)
    with exclusive(folders.run) if place.is_first else nullcontext():
        ledger = Ledger(folders.goodput if place.is_first else None, "init", age=process_age())
        stage = prepare(recipe, folders, place, sink)
        first_step = stage.step
        journal = None
        if place.is_first:
            peak = _peak(place, training)
            journal = Journal(
                recipe, folders, ledger, first_step=first_step, metrics_port=metrics_port, peak_flops=peak
            )
        stopping = False
        while stage.step < training.total_steps and not stopping:
            began = time.perf_counter()
            rate = learning_rate(recipe.optimizer, stage.step, training.total_steps)
            compiles = training.compile and stage.step in (first_step, training.steps)
            ledger.switch("compile" if compiles else "step")
            beat(stage.step, "compile" if compiles or stage.step == first_step else "step")
            done = stage.train_step(rate, should_stop, ledger)
            stopping = done.stopping
            if journal:
                journal.note(
                    stage.step,
                    loss=done.loss,
                    grad_norm=done.grad_norm,
                    learning_rate=rate,
                    seconds=time.perf_counter() - began,
                    cost=done.cost,
                    rank_seconds=done.rank_seconds,
                )
            if stage.step % training.checkpoint_every == 0 or stage.step == training.total_steps or stopping:
                beat(stage.step, "checkpoint")
                with ledger.book("checkpoint_stall"):
                    stage.save()
                if journal:
                    journal.note_save(stage.step)
            stage.writer.check()
            if journal:
                journal.note_durable(stage.writer.last)
        beat(stage.step, "checkpoint")
        _finish(stage, journal, ledger)
        beat(stage.step, "leave")
        parallel.leave()
    return stage.step == training.total_steps


def _finish(stage: StageTraining, journal: Journal | None, ledger: Ledger) -> None:
    """Wait until the last checkpoint is durable, and give back what the run held."""
    with ledger.book("checkpoint_stall"):
        last = stage.writer.wait()
        stage.writer.close()
    stage.loader.close()
    if journal:
        journal.note_durable(last)
        journal.close()


def _peak(place: parallel.Place, training: TrainingConfig) -> float | None:
    """Operations a second that all ranks' hardware is said to do; None where nobody says."""
    gpu = gpu_of(torch.cuda.get_device_name(place.device)) if place.device.type == "cuda" else None
    return None if gpu is None else gpu.peak(training.precision) * training.world_size
