"""A stage small enough for tests, with real data, codec and text encoder: seconds from start to last checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.data.clips import SHAPES_SOURCE, shape_samples
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.generation import to_frames
from model.recipe import StageRecipe
from model.training.run import RunFolders
from model.vae import PatchPca


@dataclass(slots=True, frozen=True)
class Inputs:
    """What every run of a test reads."""

    data: Path
    codec: Path

    def folders(self, run: Path, initial: Path | None = None) -> RunFolders:
        return RunFolders(data=self.data, codec=self.codec, run=run, initial=initial)


def write_inputs(folder: Path, *, clips: int = 24) -> Inputs:
    samples = list(shape_samples(generate(clips, num_frames=4, size=32, seed=1)))
    with ShardWriter(folder / "data" / "train") as writer:
        for sample in samples:
            writer.write(sample)
    PatchPca.fit(to_frames([sample.frames for sample in samples]), 4, 8).save(folder / "codec")
    return Inputs(folder / "data", folder / "codec")


def stage(task: str = "t2v", **training: Any) -> StageRecipe:
    still = task == "t2i"
    return StageRecipe.model_validate(
        {
            "name": task,
            "task": task,
            "parent": "t2v" if task == "ti2v" else None,
            "network": {
                "hidden_size": 32,
                "depth": 3,
                "num_heads": 2,
                "temporal_patch_size": 1 if still else 2,
                "temporal_attention": not still,
            },
            "video": {"num_frames": 1 if still else 4, "height": 32, "width": 32},
            "vae": {"latent_channels": 4, "spatial_factor": 8},
            "optimizer": {"lr": 2e-3, "warmup_steps": 3},
            "training": {
                "steps": 8,
                "unmasked_steps": 2,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "checkpoint_every": 5,
                "keep_checkpoints": 3,
                "log_every": 2,
                **training,
            },
            "data": {"weights": {SHAPES_SOURCE: 1.0}},
            "gate": [{"metric": "heldout_loss", "op": "<", "bound": 2.0}],
        }
    )
