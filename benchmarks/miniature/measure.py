"""What a trained row is measured on: everything `evaluate` measures, and a few drawn clips for pictures.

It owns which clips are shown; it knows nothing of rows, seeds or claims.
"""

from pathlib import Path

import numpy as np
import torch

from model import tasks
from model.data.cut import caption_of, middle_cut
from model.data.shards import ShardSet
from model.generation import ClipGenerator, to_frames
from model.training.evaluate import SEED, evaluate

SHOWN = 4
"""Clips of each task that are kept."""


@torch.no_grad()
def measure(generator: ClipGenerator, heldout: ShardSet, folder: Path) -> dict[str, float]:
    """The figures of `evaluate`, pictures in `folder`, and drawn clips uint8 [SHOWN, T, H, W, 3] as `TASK.npy`."""
    recipe = generator.recipe
    figures = dict(evaluate(generator, heldout, folder).metrics)
    samples = [heldout.sample(place) for place in range(SHOWN)]
    for task in tasks.evaluated(recipe):
        places = tasks.source_frames(recipe.video, task, recipe.network.temporal_patch_size)
        clips = to_frames([middle_cut(sample, recipe.video, places).clip for sample in samples])
        captions = [caption_of(sample, still=recipe.video.num_frames == 1) for sample in samples]
        np.save(
            folder / f"{task}.npy", np.stack(generator.complete(captions, clips, task, seed=SEED)), allow_pickle=False
        )
    return figures
