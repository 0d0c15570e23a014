"""`stiv generate`: a prompt and given frames become a video, by any task, from a published checkpoint.

It owns the reading of given frames and the order of things; which frames a task takes and how it is drawn are
`model.tasks` and `model.generation`.
"""

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infra.evaluation import read_first_frame
from infra.registry.registry import Registry
from infra.serving import media
from infra.trained import fetch_trained
from model.config import SamplingConfig, VideoConfig
from model.data.scenes import VIDEO_SUFFIXES, read_frames
from model.generation import Clip, ClipGenerator, denoise_steps, to_frames
from model.tasks import Plan, plan

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


@dataclass(slots=True, frozen=True)
class Wish:
    """What is to be drawn."""

    prompt: str
    task: str | None
    """None is `ti2v` with given frames and `t2v` (or `t2i`) without."""
    frames: Sequence[Path]
    """Image and video files; their frames in this order are the given ones."""
    take: str | None
    """START:STOP:STEP of those frames; None is all of them."""
    seed: int
    overrides: Sequence[str]
    """`sampling.key=value`."""
    out: Path
    device: str = "cpu"


def generate(registry: Registry, ref: str, wish: Wish, work: Path, console: Console) -> Clip:
    """Draw the video of `wish` with the checkpoint at `ref`, show a bar over denoise steps, and write `wish.out`."""
    if wish.out.suffix not in (".mp4", ".png"):
        raise ValueError(f"--out {wish.out}: '{wish.out.suffix}' cannot be written; use .mp4, or .png for one frame")
    trained = fetch_trained(registry, ref, work)
    recipe = trained.recipe
    given = list(_taken(_read(wish.frames, recipe.video), wish.take))
    task = wish.task or ("ti2v" if given else "t2i" if recipe.video.num_frames == 1 else "t2v")
    planned = plan(recipe, task, len(given))
    planned = replace(planned, sampling=_overridden(planned.sampling, wish.overrides))
    if wish.prompt and not planned.takes_text:
        raise ValueError(f"task '{task}' takes no prompt, and '{wish.prompt}' would be left out; leave it away")
    if wish.out.suffix == ".png" and len(planned.returned) > 1:
        raise ValueError(f"--out {wish.out}: {len(planned.returned)} frames do not fit into one picture; use .mp4")

    generator = trained.generator(wish.device)
    _check_prompt(generator, wish.prompt)
    film = _drawn(generator, planned, wish, given, console)
    wish.out.parent.mkdir(parents=True, exist_ok=True)
    if wish.out.suffix == ".png":
        wish.out.write_bytes(media.png(film))
    else:
        media.write_mp4(wish.out, film, recipe.video.fps)
    return film


def _read(paths: Sequence[Path], video: VideoConfig) -> Iterator[Clip]:
    """Every frame [1, H, W, 3] of the files, scaled to cover the recipe's size and cropped at the centre."""
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            yield from (frame[None] for frame in read_frames(path, height=video.height, width=video.width))
        elif suffix in IMAGE_SUFFIXES:
            yield read_first_frame(path, video)
        else:
            known = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
            raise ValueError(f"--frames {path}: '{path.suffix}' is neither an image nor a video; use one of {known}")


def _taken(frames: Iterator[Clip], take: str | None) -> Iterator[Clip]:
    if take is None:
        return frames
    found = re.fullmatch(r"(\d*):(\d*)(?::([1-9]\d*))?", take)
    if found is None:
        raise ValueError(f"--take '{take}' is not START:STOP or START:STOP:STEP, such as 0:4 or 0:24:3")
    start, stop, step = (int(part) if part else None for part in found.groups())
    return islice(frames, start, stop, step)


def _overridden(sampling: SamplingConfig, overrides: Sequence[str]) -> SamplingConfig:
    values: dict[str, object] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, name = key.strip().partition(".")
        if section != "sampling" or not name or not text:
            raise ValueError(f"--set '{override}' is not sampling.key=value; all else was fixed in training")
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            raise ValueError(f"--set '{override}': '{text}' is not a TOML value (quote strings)") from None
    try:
        return SamplingConfig.model_validate({**sampling.model_dump(), **values})
    except ValidationError as error:
        wrong = "; ".join(f"sampling.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{wrong} (known here: {', '.join(sorted(SamplingConfig.model_fields))})") from None


def _check_prompt(generator: ClipGenerator, prompt: str) -> None:
    count, limit = generator.text.count_tokens(prompt), generator.recipe.text.max_tokens
    if count > limit:
        raise ValueError(f"the prompt has {count} tokens, at most {limit} are read; shorten it")


def _drawn(generator: ClipGenerator, planned: Plan, wish: Wish, given: Sequence[Clip], console: Console) -> Clip:
    frames = to_frames(given)[:, 0] if given else None
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        bar = progress.add_task(f"{planned.task}, denoise steps", total=denoise_steps(planned))
        film = generator.film(planned, wish.prompt, frames, seed=wish.seed, on_step=lambda: progress.advance(bar))
    return np.ascontiguousarray(film)
