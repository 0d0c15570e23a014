"""The training loop of a stage, the same for every task: the task is data in the batch.

It owns what happens between steps: notes, checkpoints, the end. Ranks are `parallel`'s, the step is `stage`'s, files
are `checkpoint`'s and `run`'s, and who started it is not known here.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext

from model.optim.choice import learning_rate
from model.recipe import StageRecipe
from model.training import parallel
from model.training.journal import Journal
from model.training.prepare import prepare
from model.training.run import RunFolders, exclusive


def train(
    recipe: StageRecipe,
    folders: RunFolders,
    *,
    metrics_port: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train a stage, from its parent, from scratch, or on from the run folder's latest checkpoint.

    Every rank calls it. Where `should_stop` turns true on any rank, all finish that step and a checkpoint is written.

    Returns:
        True when all steps are done, False when it was stopped before.
    """
    training = recipe.training
    place = parallel.join(training)
    with exclusive(folders.run) if place.is_first else nullcontext():
        stage = prepare(recipe, folders, place)
        journal = Journal(recipe, folders, first_step=stage.step, metrics_port=metrics_port) if place.is_first else None
        stopping = False
        while stage.step < training.total_steps and not stopping:
            began = time.perf_counter()
            rate = learning_rate(recipe.optimizer, stage.step, training.total_steps)
            loss, grad_norm, stopping = stage.train_step(rate, should_stop)
            if journal:
                seconds = time.perf_counter() - began
                journal.note(stage.step, loss=loss, grad_norm=grad_norm, learning_rate=rate, seconds=seconds)
            if journal and (
                stage.step % training.checkpoint_every == 0 or stage.step == training.total_steps or stopping
            ):
                began = time.perf_counter()
                journal.note_checkpoint(stage.save(), time.perf_counter() - began)
        if journal:
            journal.close()
        parallel.leave()
    return stage.step == training.total_steps
