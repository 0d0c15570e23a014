"""A published checkpoint measured on its held-out clips, or made to draw the videos of a benchmark's suite.

It owns what a checkpoint is measured on and what is written; the measures are the model's.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from infra.registry.names import DATASET
from infra.registry.registry import Registry
from infra.serving import media
from infra.serving.safety.decoding import BadUpload, Wanted, image_png
from infra.trained import Trained, fetch_trained
from model.config import VideoConfig
from model.data.shards import ShardSet
from model.generation import Clip, ClipGenerator, to_frames
from model.measures.networks import NetworkCard, OnnxNetwork
from model.measures.vbench import SuitePrompt, missing_videos, read_suite, write_seeds
from model.training.evaluate import Evaluation, evaluate

REPORT = "evaluation.json"
MAX_IMAGE_PIXELS = 100_000_000


class MeasuredBy(BaseModel):
    """A network that figures were measured by."""

    sha256: str
    card: NetworkCard


class EvaluationReport(BaseModel):
    """`evaluation.json`: the figures and all that they depend on."""

    # A diverged checkpoint has NaN figures; JSON has no NaN but as a string.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    checkpoint: str
    dataset: str
    codec: str
    clips: int
    """Drawn for each task."""
    networks: list[MeasuredBy]
    metrics: dict[str, float]


def evaluate_checkpoint(
    registry: Registry,
    ref: str,
    work: Path,
    *,
    networks: Sequence[OnnxNetwork] = (),
    clips: int | None = None,
    device: str = "cpu",
) -> Evaluation:
    """Measure the checkpoint at `ref` on the held-out clips of its own data set; below `work` lies what is written.

    An imported checkpoint, which has no data set of its own, is measured on the promoted one.
    """
    trained = fetch_trained(registry, ref, work)
    dataset = registry.resolve(trained.manifest.parents.get("dataset", DATASET))
    heldout = ShardSet(registry.fetch(dataset, work / "inputs" / dataset.digest[:16]) / "heldout")
    folder = work / trained.manifest.digest[:16]
    done = evaluate(trained.generator(device), heldout, folder, count=clips, networks=networks)
    report = EvaluationReport(
        checkpoint=trained.manifest.digest,
        dataset=dataset.digest,
        codec=trained.manifest.parents["codec"],
        clips=clips or trained.recipe.evaluation.sample_prompts,
        networks=[MeasuredBy(sha256=network.sha256, card=network.card) for network in networks],
        metrics=dict(done.metrics),
    )
    (folder / REPORT).write_text(report.model_dump_json(indent=2) + "\n")
    return done


def draw_suite(
    trained: Trained,
    prompts: Path,
    out: Path,
    *,
    images: Path | None = None,
    device: str = "cpu",
    on_video: Callable[[int, int], None] = lambda drawn, wanted: None,
) -> int:
    """Draw the videos of the suite in `prompts` that `out` lacks, named as VBench wants them; how many were drawn.

    Each has a seed of its own, a function of its file name alone, listed in `OUT.seeds.json`. `images` is the folder
    of first frames of an image-to-video suite.
    """
    suite = read_suite(prompts)
    generator = trained.generator(device)
    _check_suite(generator, suite, images)
    out.mkdir(parents=True, exist_ok=True)
    write_seeds(suite, out.with_name(out.name + ".seeds.json"))  # beside: VBench reads every file in the folder
    missing = missing_videos(suite, out)
    for index, video in enumerate(missing):
        image = None if images is None or video.prompt.image is None else _image(images / video.prompt.image, generator)
        (clip,) = generator([video.prompt.prompt], images=image, seed=video.seed)
        draft = out.with_name(f".{out.name}-{os.getpid()}.mp4")
        media.write_mp4(draft, clip, trained.recipe.video.fps)
        draft.replace(out / video.file_name)
        on_video(index + 1, len(missing))
    return len(missing)


def _check_suite(generator: ClipGenerator, suite: Sequence[SuitePrompt], images: Path | None) -> None:
    """Everything that could stop a suite of hours half way."""
    recipe = generator.recipe
    if recipe.video.num_frames == 1:
        raise ValueError(f"stage '{recipe.name}' draws images; a suite of videos needs a stage that draws clips")
    for each in suite:
        tokens = generator.text.count_tokens(each.prompt)
        if tokens > recipe.text.max_tokens:
            raise ValueError(f"'{each.prompt[:60]}' has {tokens} tokens, stage reads at most {recipe.text.max_tokens}")
        if (each.image is None) != (images is None):
            needs = "no first frame" if each.image is None else f"first frame {each.image}"
            raise ValueError(f"'{each.prompt[:60]}' has {needs}, images are in {images}; a suite is of one kind")
        if images is not None and each.image is not None and not (images / each.image).is_file():
            raise ValueError(f"{images / each.image}: no such image; VBench-I2V offers its images for download")


def read_first_frame(path: Path, video: VideoConfig) -> Clip:
    """The image at `path` as uint8 [1, H, W, 3], scaled to cover, cropped at the centre; ValueError names the file."""
    side = MAX_IMAGE_PIXELS  # the user's own file: pixels alone are bounded
    wanted = Wanted("image", video.width, video.height, max_pixels=side, max_side=side, max_seconds=math.inf)
    try:
        return media.read_image(image_png(path.read_bytes(), wanted))
    except BadUpload as error:
        raise ValueError(f"{path}: {error}") from None


def _image(path: Path, generator: ClipGenerator) -> torch.Tensor:
    """A first frame [1, 3, H, W] in [-1, 1]."""
    return to_frames([read_first_frame(path, generator.recipe.video)])[:, 0]
