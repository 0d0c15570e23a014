"""Evaluation of a trained stage: held-out flow loss, pictures, and what drawn clips measure beside held-out ones.

It owns the measures that a gate reads; it knows nothing of gates, stores or how the weights came to be.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from model import tasks
from model.checkpoint import folder as checkpoint
from model.conditioning import Conditions, replace_frames
from model.config import Task
from model.data.cut import caption_of, middle_cut
from model.data.loader import ClipLoader
from model.data.moving_shapes import ShapeSpec
from model.data.shards import Sample, ShardSet
from model.diffusion import flow_velocity
from model.flow_matching import interpolate, loss_weight, masked_losses, velocity_target
from model.generation import Clip, ClipGenerator, to_frames
from model.measures import motion
from model.measures.checker import accuracy, first_frame_psnr, observe, speed_error
from model.measures.features import PixelMotionFeatures
from model.measures.frechet import frechet_distance, inception_score
from model.measures.networks import OnnxNetwork
from model.measures.samples import SAMPLES, SampleFigures
from model.measures.similarity import WINDOW, psnr, ssim
from model.network.stiv import STIV
from model.recipe import StageRecipe
from model.sampler import GuidingVelocity
from model.text import load_text_encoder
from model.training.pictures import animate, sample_grid
from model.vae import load_codec

TIMES = 8
"""Flow times, evenly spread over (0, 1), at which the held-out loss is measured."""
SEED = 20241210
"""Fixed: two checkpoints are measured on the same clips, noise and times."""
SHAPES = "moving_shapes"
CLIPS_AT_ONCE = 64
"""Clips drawn as one batch; a further batch has its own seed."""
ANIMATED = 16


@dataclass(slots=True, frozen=True)
class Evaluation:
    """Figures of a checkpoint and where its pictures lie."""

    metrics: Mapping[str, float]
    grid: Path
    clips: Mapping[str, Path]
    """Task -> animated picture of the first samples."""
    samples: Path
    """`samples.json`: the figures sample by sample."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All that was written."""
        return (self.samples, self.grid, *self.clips.values())


@dataclass(slots=True, frozen=True)
class Heldout:
    """Held-out clips of one shape, as a task takes them."""

    keys: list[str]
    clips: list[Clip]
    captions: list[str]
    specs: list[ShapeSpec]
    """What moving shapes show; empty for clips of any other source."""


@torch.no_grad()
def evaluate(
    generator: ClipGenerator,
    heldout: ShardSet,
    folder: Path,
    *,
    count: int | None = None,
    networks: Sequence[OnnxNetwork] = (),
) -> Evaluation:
    """Measure a network on held-out clips and write `samples.png` and animations into `folder`.

    `count` clips are drawn a task, the recipe's `evaluation.sample_prompts` unless said. docs/evaluate.md lists the
    metrics; what a data set, a task or a clip's length cannot give is absent.
    """
    recipe = generator.recipe
    folder.mkdir(parents=True, exist_ok=True)
    by_sample = heldout_losses(generator, heldout)
    metrics = {name: _mean(losses.values()) for name, losses in by_sample.items()}
    samples = _samples(heldout, recipe, count or recipe.evaluation.sample_prompts)
    strips: list[tuple[str, list[Clip]]] = []
    clips: dict[str, Path] = {}
    for task in tasks.evaluated(recipe):
        wanted = _cut(samples, recipe, task)
        drawn = _drawn(generator, task, wanted)
        for name, values in _by_clip(recipe, task, drawn, wanted, networks).items():
            by_sample[f"{task}_{name}"] = dict(zip(wanted.keys, values, strict=True))
            metrics[f"{task}_{name}"] = _mean(values)
        metrics |= {f"{task}_{name}": value for name, value in _figures(recipe, drawn, wanted, networks).items()}
        strips.append((task, drawn))
        clips[task] = folder / f"{task}.webp"
        animate(drawn[:ANIMATED], clips[task], fps=recipe.video.fps)
    grid = folder / "samples.png"
    sample_grid(strips, [_caption(recipe, sample) for sample in samples], grid)
    metrics["sample_grid_written"] = float(grid.stat().st_size > 0)
    figures = folder / SAMPLES
    SampleFigures(conditions=_conditions(generator, heldout), figures=by_sample).write(figures)
    return Evaluation(metrics, grid, clips, figures)


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
    """A generator over `network`, wherever its weights are, with the codec in folder `codec` and the recipe's text."""
    device = next(network.parameters()).device

    def predict(latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        given = conditions.to(device)
        prediction = network(
            latents.to(device),
            t.to(device),
            given.text,
            given.text_mask,
            given.pooled,
            given.micro,
            image=given.image,
            image_given=given.image_given,
        )
        return cast(Tensor, prediction).to(latents.device)

    velocity = flow_velocity(recipe.flow, predict)
    return ClipGenerator(velocity, load_codec(codec, recipe.vae), load_text_encoder(recipe.text), recipe)


@torch.no_grad()
def heldout_losses(generator: ClipGenerator, heldout: ShardSet) -> dict[str, dict[str, float]]:
    """Flow-matching loss by sample: `heldout_loss_t0` and on at each of `TIMES` times, `heldout_loss` over all of them.

    The stage's own frames stay clean. The loss is the flow's whatever the stage learns, and of the frames that are not
    given, so that recipes compare.
    """
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
        temporal_patch_size=recipe.network.temporal_patch_size,
    )
    batch = next(loader)
    rng = torch.Generator().manual_seed(SEED)
    latents = generator.codec.encode(batch.frames)
    noise = torch.randn(latents.shape, generator=rng)
    rows = latents.shape[0]
    frame_mask = tasks.frame_mask(recipe, recipe.task).expand(rows, -1)
    weight = loss_weight(frame_mask, latents, keep=None, patch_size=recipe.network.patch_size)
    texts = [""] * rows if recipe.task in tasks.TEXTLESS else batch.captions
    conditions = Conditions.of(generator.text.encode(texts), batch.micro)
    if recipe.network.image_cross_attention != "off":
        conditions = conditions.with_image(latents[:, 0], frame_mask[:, 0])
    keys = _unique(batch.keys)
    losses: list[Tensor] = []
    network = generator.velocity
    assert not isinstance(network, GuidingVelocity), "a loss is of one pass of the network, not of guided ones"
    for index in range(TIMES):
        t = torch.full((rows,), (index + 0.5) / TIMES)
        noisy = interpolate(latents, noise, t)
        if recipe.conditioning.frame_replacement:
            noisy = replace_frames(noisy, latents, frame_mask)
        velocity = network(noisy, t, conditions)
        losses.append(masked_losses(velocity, velocity_target(latents, noise), weight).double())
    named = {"heldout_loss": torch.stack(losses).mean(0)}
    named |= {f"heldout_loss_t{index}": loss for index, loss in enumerate(losses)}
    return {name: dict(zip(keys, map(float, values), strict=True)) for name, values in named.items()}


def _samples(heldout: ShardSet, recipe: StageRecipe, count: int) -> list[Sample]:
    """The first held-out samples that are long enough for every task, moving shapes if the stage trains on them."""
    sources = {SHAPES} if SHAPES in recipe.data.weights and SHAPES in heldout.sources else set(recipe.data.weights)
    needed = 1 + max(places[-1] for places in (_places(recipe, task) for task in tasks.evaluated(recipe)))
    fitting = [
        place for place, entry in enumerate(heldout.entries) if entry.source in sources and entry.num_frames >= needed
    ]
    if len(fitting) < count:
        raise ValueError(
            f"{count} clips are to be drawn (evaluation.sample_prompts), but only {len(fitting)} held-out clips of"
            f" {sorted(sources)} have {needed} frames; lower it or build a larger data set"
        )
    return [heldout.sample(place) for place in fitting[:count]]


def _places(recipe: StageRecipe, task: Task) -> tuple[int, ...]:
    return tasks.source_frames(recipe.video, task, recipe.network.temporal_patch_size)


def _cut(samples: Sequence[Sample], recipe: StageRecipe, task: Task) -> Heldout:
    shapes = all(sample.source == SHAPES for sample in samples)
    return Heldout(
        keys=[sample.key for sample in samples],
        clips=[middle_cut(sample, recipe.video, _places(recipe, task)).clip for sample in samples],
        captions=[_caption(recipe, sample) for sample in samples],
        specs=[_spec(sample) for sample in samples] if shapes else [],
    )


def _drawn(generator: ClipGenerator, task: Task, wanted: Heldout) -> list[Clip]:
    """A clip for each caption, the task's frames given from the held-out clip."""
    drawn: list[Clip] = []
    for batch, first in enumerate(range(0, len(wanted.captions), CLIPS_AT_ONCE)):
        part = slice(first, first + CLIPS_AT_ONCE)
        drawn += generator.complete(wanted.captions[part], to_frames(wanted.clips[part]), task, seed=SEED + batch)
    return drawn


def _figures(
    recipe: StageRecipe, drawn: list[Clip], wanted: Heldout, networks: Sequence[OnnxNetwork]
) -> dict[str, float]:
    """The figures that clips have together only, by name without the task."""
    figures: dict[str, float] = {}
    if wanted.specs:
        error = speed_error([observe(clip) for clip in drawn], [observe(clip).travel for clip in wanted.clips])
        figures |= {} if math.isnan(error) else {"speed_error": error}
    if motion.has_pairs(recipe.video.num_frames, recipe.video.fps):
        degree, flow = motion.degree_and_flow(drawn, fps=recipe.video.fps)
        figures |= {"dynamic_degree": degree, "mean_flow": flow}
    if len(drawn) > 1:
        extract = PixelMotionFeatures()
        figures[f"frechet_{extract.name}"] = frechet_distance(extract(drawn), extract(wanted.clips))
    for network in networks:
        if network.card.measure in ("fvd", "fid"):
            distance = frechet_distance(network(drawn), network(wanted.clips))
            figures[f"{network.card.measure}_{network.name}"] = distance
        elif network.card.measure == "inception_score":
            mean, spread = inception_score(network(drawn).softmax(dim=1), splits=network.card.splits)
            figures |= {f"inception_score_{network.name}": mean, f"inception_score_sd_{network.name}": spread}
    return figures


def _by_clip(
    recipe: StageRecipe, task: Task, drawn: list[Clip], wanted: Heldout, networks: Sequence[OnnxNetwork]
) -> dict[str, list[float]]:
    """The figures that each clip has by itself, by name without the task."""
    figures: dict[str, list[float]] = {}
    if wanted.specs:
        figures |= _checked(drawn, wanted)
    return figures | _nearness(recipe, task, drawn, wanted, networks)


def _checked(drawn: list[Clip], wanted: Heldout) -> dict[str, list[float]]:
    """What the checker of moving shapes says: 1 where a clip follows its caption."""
    each = [asdict(accuracy([observe(clip)], [spec])) for clip, spec in zip(drawn, wanted.specs, strict=True)]
    words = ("color", "shape") if drawn[0].shape[0] == 1 else ("color", "shape", "direction", "joint")
    return {f"{word}_accuracy": [found[word] for found in each] for word in words}


def _nearness(
    recipe: StageRecipe, task: Task, drawn: list[Clip], wanted: Heldout, networks: Sequence[OnnxNetwork]
) -> dict[str, list[float]]:
    """How near drawn clips are to the held-out ones whose frames they were given; nothing where none were."""
    given = tasks.given_frames(recipe, task)
    if not given:
        return {}
    figures: dict[str, list[float]] = {}
    if 0 in given:
        figures["first_frame_psnr_db"] = [
            first_frame_psnr(clip, held[0]) for clip, held in zip(drawn, wanted.clips, strict=True)
        ]
    free = [frame for frame in range(recipe.video.num_frames) if frame not in given]
    pairs = [(clip[free], held[free]) for clip, held in zip(drawn, wanted.clips, strict=True)]
    figures["psnr_db"] = [psnr(*pair) for pair in pairs]
    if min(recipe.video.height, recipe.video.width) >= WINDOW:
        figures["ssim"] = [ssim(*pair) for pair in pairs]
    for network in networks:
        if network.card.measure == "lpips":
            figures[f"lpips_{network.name}"] = [float(network.distance(*pair).mean()) for pair in pairs]
    return figures


def _conditions(generator: ClipGenerator, heldout: ShardSet) -> dict[str, str]:
    """What figures depend on beside the network and how it is sampled."""
    video = generator.recipe.video
    shards = hashlib.sha256("".join(shard.sha256 for shard in heldout.index.shards).encode())
    codec = hashlib.sha256()
    for name, tensor in sorted(cast(torch.nn.Module, generator.codec).state_dict().items()):
        codec.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "heldout": shards.hexdigest(),
        "codec": codec.hexdigest(),
        "video": f"{video.num_frames}x{video.height}x{video.width}@{video.fps:g}",
        "seed": str(SEED),
        "times": str(TIMES),
    }


def _unique(keys: Sequence[str]) -> list[str]:
    """A small set gives a clip more than once; each time it is a sample of its own."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for key in keys:
        names.append(f"{key}#{seen[key]}" if seen[key] else key)
        seen[key] += 1
    return names


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _spec(sample: Sample) -> ShapeSpec:
    return ShapeSpec(*(cast(str, sample.extra[word]) for word in ("color", "shape", "direction")))


def _caption(recipe: StageRecipe, sample: Sample) -> str:
    return caption_of(sample, still=recipe.video.num_frames == 1)
