"""A rank of test_layouts: prepare a stage as the recipe spreads it, train some steps, save."""

from model.recipe import StageRecipe
from model.training import parallel
from model.training.prepare import prepare
from model.training.run import RunFolders
from monitoring.goodput import Ledger


def train(stage: StageRecipe, folders: RunFolders, steps: int) -> None:
    place = parallel.join(stage.training)
    training = prepare(stage, folders, place)
    losses = [training.train_step(2e-3, lambda: False, Ledger(None, "init")).loss for _ in range(steps)]
    training.save()
    training.writer.close()
    if place.is_first:
        with (folders.run / "losses").open("a") as file:
            file.writelines(f"{loss!r}\n" for loss in losses)
    parallel.leave()
