"""Evaluation of a trained stage: held-out flow loss, a sample grid, and the checker's accuracy on moving shapes.

It owns the measures that a gate reads; it knows nothing of gates, stores or how the weights came to be.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model.conditioning import Conditions, draw_frame_mask, replace_frames
from model.data.checker import accuracy, first_frame_psnr, observe
from model.data.loader import ClipLoader
from model.data.moving_shapes import ShapeSpec
from model.data.shards import Sample, ShardSet
from model.flow_matching import interpolate, loss_weight, masked_loss, velocity_target
from model.generation import Clip, ClipGenerator, to_frames
from model.network.stiv import STIV
from model.recipe import StageRecipe
from model.text import load_text_encoder
from model.training import checkpoint
from model.vae import load_codec

TIMES = 8
"""Flow times, evenly spread over (0, 1), at which the held-out loss is measured."""
SEED = 20241210
"""Fixed: two checkpoints are measured on the same clips, noise and times."""
SHAPES = "moving_shapes"


@dataclass(slots=True, frozen=True)
class Evaluation:
    """Figures of a checkpoint and where its pictures lie."""

    metrics: Mapping[str, float]
    grid: Path
    clips: Mapping[str, Path]
    """Task -> animated picture of the first samples."""


@torch.no_grad()
def evaluate(generator: ClipGenerator, heldout: ShardSet, folder: Path) -> Evaluation:
    """Measure a network on held-out clips and write `samples.png` and animations into `folder`.

    Metrics: `heldout_loss`; on moving shapes `TASK_{color,shape,direction,joint}_accuracy` in [0, 1] and, for
    image-to-video, `ti2v_first_frame_psnr_db`; `sample_grid_written` is 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"heldout_loss": heldout_loss(generator, heldout)}
    samples = _shape_samples(heldout, generator.recipe.evaluation.sample_prompts)
    specs = [_spec(sample) for sample in samples]
    strips: list[tuple[str, list[Clip]]] = []
    clips: dict[str, Path] = {}
    for task in _tasks(generator.recipe):
        drawn, figures = _draw(generator, task, samples, specs)
        metrics.update(figures)
        strips.append((task, drawn))
        clips[task] = folder / f"{task}.webp"
        animate(drawn[:16], clips[task], fps=generator.recipe.video.fps)
    grid = folder / "samples.png"
    captions = [_caption(generator.recipe, spec) for spec in specs]
    sample_grid(strips, captions, grid)
    metrics["sample_grid_written"] = float(grid.stat().st_size > 0)
    return Evaluation(metrics, grid, clips)


def load_network(recipe: StageRecipe, trained: Path) -> STIV:
    """The network with the EMA weights of the checkpoint folder `trained`, every digest verified; frozen."""
    weights = checkpoint.load_weights(trained, "ema")
    network = STIV(
        recipe.network,
        latent_channels=recipe.vae.latent_channels,
        text_size=weights["text_projection.hidden.weight"].shape[1],
        pooled_size=weights["pooled_projection.weight"].shape[1],
    )
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def make_generator(recipe: StageRecipe, network: STIV, codec: Path) -> ClipGenerator:
    """A generator over `network` with the codec in folder `codec` and the recipe's text encoder."""

    def velocity(latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return network(latents, t, conditions.text, conditions.text_mask, conditions.pooled, conditions.micro)

    return ClipGenerator(velocity, load_codec(codec, recipe.vae), load_text_encoder(recipe.text), recipe)


def heldout_loss(generator: ClipGenerator, heldout: ShardSet) -> float:
    """Flow-matching loss on held-out clips, averaged over `TIMES` times; the stage's own frames stay clean."""
    recipe = generator.recipe
    loader = ClipLoader(
        heldout,
        video=recipe.video,
        data=recipe.data,
        micro_batch_size=recipe.evaluation.heldout_clips,
        rank=0,
        world_size=1,
        seed=SEED,
        task=recipe.task,
    )
    batch = next(loader)
    rng = torch.Generator().manual_seed(SEED)
    latents = generator.codec.encode(batch.frames)
    noise = torch.randn(latents.shape, generator=rng)
    rows = latents.shape[0]
    frame_mask = draw_frame_mask(recipe.task, rows, latents.shape[1], image_dropout=0.0, generator=rng)
    weight = loss_weight(frame_mask, latents, keep=None, patch_size=recipe.network.patch_size)
    conditions = Conditions.of(generator.text.encode(batch.captions), batch.micro)
    losses: list[float] = []
    for index in range(TIMES):
        t = torch.full((rows,), (index + 0.5) / TIMES)
        noisy = replace_frames(interpolate(latents, noise, t), latents, frame_mask)
        velocity = generator.velocity(noisy, t, conditions)
        losses.append(float(masked_loss(velocity, velocity_target(latents, noise), weight)))
    return sum(losses) / len(losses)


def sample_grid(strips: list[tuple[str, list[Clip]]], captions: list[str], path: Path, rows: int = 12) -> None:
    """One picture: a caption a row, every frame of the clip beside it, a block a task."""
    scale, left, gap = 2, 190, 4
    height, width = strips[0][1][0].shape[1] * scale, strips[0][1][0].shape[2] * scale
    frames = strips[0][1][0].shape[0]
    shown = min(rows, len(captions))
    block = left + frames * (width + 2)
    canvas = Image.new("RGB", (block * len(strips), shown * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (task, clips) in enumerate(strips):
        for row, clip in enumerate(clips[:shown]):
            top = row * (height + gap)
            pen.text((column * block + 6, top + height // 2 - 6), f"{task}: {captions[row]}", fill="black")
            for index, frame in enumerate(clip):
                picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(picture, (column * block + left + index * (width + 2), top))
    canvas.save(path)


def animate(clips: list[Clip], path: Path, *, fps: int, columns: int = 8) -> None:
    """The clips side by side as one looping WebP."""
    scale = 2
    rows = -(-len(clips) // columns)
    side = clips[0].shape[1:3]
    frames: list[Image.Image] = []
    for index in range(clips[0].shape[0]):
        wall = np.full((rows * (side[0] + 2), columns * (side[1] + 2), 3), 255, dtype=np.uint8)
        for place, clip in enumerate(clips):
            top, left = place // columns * (side[0] + 2), place % columns * (side[1] + 2)
            wall[top : top + side[0], left : left + side[1]] = clip[index]
        picture = Image.fromarray(wall)
        frames.append(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, lossless=True)


def _tasks(recipe: StageRecipe) -> tuple[str, ...]:
    """A TI2V stage answers both tasks, thanks to image dropout."""
    return ("t2v", "ti2v") if recipe.task == "ti2v" else (recipe.task,)


def _draw(
    generator: ClipGenerator, task: str, samples: list[Sample], specs: list[ShapeSpec]
) -> tuple[list[Clip], dict[str, float]]:
    images: Tensor | None = None
    originals = [sample.frames[:1] for sample in samples]
    if task == "ti2v":
        images = to_frames(originals)[:, 0]
    captions = [_caption(generator.recipe, spec) for spec in specs]
    clips = generator(captions, images=images, seed=SEED)
    still = clips[0].shape[0] == 1
    seen = [observe(clip) for clip in clips]
    figures = {f"{task}_{name}_accuracy": value for name, value in asdict(accuracy(seen, specs)).items()}
    if still:
        del figures[f"{task}_direction_accuracy"], figures[f"{task}_joint_accuracy"]
    if task == "ti2v":
        kept = [first_frame_psnr(clip, image[0]) for clip, image in zip(clips, originals, strict=True)]
        figures["ti2v_first_frame_psnr_db"] = sum(kept) / len(kept)
    return clips, figures


def _shape_samples(heldout: ShardSet, count: int) -> list[Sample]:
    places = [place for place, entry in enumerate(heldout.entries) if entry.source == SHAPES][:count]
    if len(places) < count:
        raise ValueError(
            f"evaluation.sample_prompts {count} exceeds the {len(places)} held-out clips of '{SHAPES}';"
            " lower it or build a larger data set"
        )
    return [heldout.sample(place) for place in places]


def _spec(sample: Sample) -> ShapeSpec:
    return ShapeSpec(*(cast(str, sample.extra[word]) for word in ("color", "shape", "direction")))


def _caption(recipe: StageRecipe, spec: ShapeSpec) -> str:
    return spec.image_caption if recipe.video.num_frames == 1 else spec.caption
