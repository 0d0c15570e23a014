"""Ranks of test_layouts, started by torchrun: prepare a stage as the recipe spreads it, train some steps, save."""

import sys
from pathlib import Path

from model.recipe import loads_stage
from model.training import parallel
from model.training.prepare import prepare
from model.training.run import RunFolders
from monitoring.goodput import Ledger


def main(recipe: str, data: str, codec: str, run: str, steps: str) -> None:
    stage = loads_stage(Path(recipe).read_text())
    place = parallel.join(stage.training)
    training = prepare(stage, RunFolders(Path(data), Path(codec), Path(run)), place)
    losses = [training.train_step(2e-3, lambda: False, Ledger(None, "init")).loss for _ in range(int(steps))]
    training.save()
    training.writer.close()
    if place.is_first:
        with (Path(run) / "losses").open("a") as file:
            file.writelines(f"{loss!r}\n" for loss in losses)
    parallel.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
