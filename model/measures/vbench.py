"""VBench: which videos its suites ask for, how they are named, and how its scores are put together.

It owns the suites' files, the official layout of videos and the aggregation of the official `vbench` package's results,
which measures the videos themselves; it knows nothing of how a video is drawn.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pydantic import TypeAdapter, ValidationError

VIDEOS = 5
"""Videos a prompt."""
FLICKERING_VIDEOS = 25
"""The same for prompts of temporal flickering, of which VBench's static filter then keeps the still ones."""
SEEDS = 2**48

QUALITY: Mapping[str, float] = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "aesthetic_quality": 1.0,
    "imaging_quality": 1.0,
    "dynamic_degree": 0.5,
}
"""Dimension -> weight."""
SEMANTIC: Mapping[str, float] = dict.fromkeys(
    (
        "object_class",
        "multiple_objects",
        "human_action",
        "color",
        "spatial_relationship",
        "scene",
        "appearance_style",
        "temporal_style",
        "overall_consistency",
    ),
    1.0,
)
QUALITY_SHARE, SEMANTIC_SHARE = 0.8, 0.2
RANGES: Mapping[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
    "i2v_subject": (0.1462, 1.0),
    "i2v_background": (0.2615, 1.0),
}
"""Score that normalises to 0 and to 1; (0, 1) for every other dimension."""

Convention = Literal["paper", "official"]
"""VBench-I2V of STIV's paper, or of the official script since the end of 2024. Their figures do not compare."""


@dataclass(slots=True, frozen=True)
class Scores:
    """VBench's headline figures in [0, 1]."""

    quality: float
    conditioned: float
    """Semantic score of text-to-video, I2V score of image-to-video."""
    total: float


@dataclass(slots=True, frozen=True)
class SuitePrompt:
    """A prompt and the videos that are wanted of it."""

    prompt: str
    videos: int = VIDEOS
    image: str | None = None
    """File name of the first frame in the suite's image folder; None in text-to-video."""


@dataclass(slots=True, frozen=True)
class SuiteVideo:
    """One video to draw."""

    prompt: SuitePrompt
    index: int

    @property
    def file_name(self) -> str:
        return f"{self.prompt.prompt}-{self.index}.mp4"

    @property
    def seed(self) -> int:
        """Of this video alone, whatever else is drawn before it or after."""
        return int.from_bytes(hashlib.sha256(self.file_name.encode()).digest()[:8]) % SEEDS


def text_scores(dimensions: Mapping[str, float]) -> Scores:
    """Quality, Semantic and Total of VBench from the raw scores in [0, 1] of its 16 dimensions."""
    quality, semantic = _mean(dimensions, QUALITY), _mean(dimensions, SEMANTIC)
    return Scores(quality, semantic, QUALITY_SHARE * quality + SEMANTIC_SHARE * semantic)


def image_scores(dimensions: Mapping[str, float], convention: Convention) -> Scores:
    """Quality, I2V and Total of VBench-I2V from raw scores in [0, 1].

    `paper`: quality has temporal flickering, I2V has no camera motion. `official`: the other way round.
    """
    image = {"i2v_subject": 1.0, "i2v_background": 1.0}
    if convention == "paper":
        quality, conditioned = _mean(dimensions, QUALITY), _mean(dimensions, image)
    else:
        still = {name: weight for name, weight in QUALITY.items() if name != "temporal_flickering"}
        quality, conditioned = _mean(dimensions, still), _mean(dimensions, {**image, "camera_motion": 0.1})
    return Scores(quality, conditioned, (quality + conditioned) / 2)


def read_results(files: Iterable[Path]) -> dict[str, float]:
    """Raw score of each dimension in result files of `vbench` (`NAME_eval_results.json`), in any split over files."""
    scores: dict[str, float] = {}
    for path in files:
        try:
            tree = TypeAdapter(dict[str, tuple[float, list[object]]]).validate_json(path.read_bytes(), strict=False)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; run `vbench evaluate` and name its *_eval_results.json") from None
        except ValidationError as error:
            raise ValueError(f"{path} is no result file of vbench, dimension -> [score, videos]: {error}") from None
        for name, (score, _) in tree.items():
            if scores.setdefault(name, score) != score:
                raise ValueError(f"{path} gives {name} {score:g}, an earlier file {scores[name]:g}; give one of them")
    return scores


def read_suite(path: Path) -> list[SuitePrompt]:
    """The suite in VBench's own `*_full_info.json`, or in a text file with a prompt a line.

    A prompt that stands in several dimensions comes once, with as many videos as the most demanding asks for.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; VBench_full_info.json comes with the vbench package") from None
    if path.suffix == ".json":
        listed = [_prompt(path, entry) for entry in _entries(path, text)]
    else:
        listed = [SuitePrompt(line.strip()) for line in text.splitlines() if line.strip()]
    suite: dict[str, SuitePrompt] = {}
    for each in listed:
        if not each.prompt or "/" in each.prompt or len(f"{each.prompt}-00.mp4".encode()) > 255:
            raise ValueError(f"{path}: '{each.prompt[:60]}' cannot be a file name; VBench names videos by their prompt")
        known = suite.get(each.prompt, each)
        if known.image != each.image:
            raise ValueError(f"{path}: '{each.prompt}' comes with images {known.image} and {each.image}")
        suite[each.prompt] = max(known, each, key=lambda prompt: prompt.videos)
    if not suite:
        raise ValueError(f"{path} holds no prompt")
    return list(suite.values())


def videos(suite: Sequence[SuitePrompt]) -> list[SuiteVideo]:
    """Every video that `suite` asks for, in its order."""
    return [SuiteVideo(prompt, index) for prompt in suite for index in range(prompt.videos)]


def missing_videos(suite: Sequence[SuitePrompt], folder: Path) -> list[SuiteVideo]:
    """The videos of `suite` that are not in `folder` yet, in the suite's order."""
    return [video for video in videos(suite) if not (folder / video.file_name).is_file()]


def write_seeds(suite: Sequence[SuitePrompt], path: Path) -> None:
    """The seed of every video, by file name, as VBench asks to be recorded."""
    seeds = {video.file_name: video.seed for video in videos(suite)}
    path.write_text(json.dumps(seeds, indent=1, ensure_ascii=False) + "\n")


def _mean(dimensions: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted mean of normalised scores."""
    lacking = sorted(set(weights) - set(dimensions))
    if lacking:
        raise ValueError(f"no score of {', '.join(lacking)}: evaluate these dimensions too, or the mean is no VBench")
    total = 0.0
    for name, weight in weights.items():
        if not 0.0 <= dimensions[name] <= 1.0:
            raise ValueError(f"{name} {dimensions[name]:g} is not in [0, 1]; give raw scores, not percent")
        low, high = RANGES.get(name, (0.0, 1.0))
        total += weight * (dimensions[name] - low) / (high - low)
    return total / sum(weights.values())


def _entries(path: Path, text: str) -> list[dict[str, object]]:
    try:
        return TypeAdapter(list[dict[str, object]]).validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path} is no suite of VBench, a list of prompts with their dimensions: {error}") from None


def _prompt(path: Path, entry: dict[str, object]) -> SuitePrompt:
    prompt, dimensions, image = entry.get("prompt_en"), entry.get("dimension"), entry.get("image_name")
    if not isinstance(prompt, str) or not isinstance(dimensions, list) or not isinstance(image, str | None):
        raise ValueError(f"{path}: {str(entry)[:120]} has no prompt_en and dimension, as VBench's suites have")
    # Image-to-video has no static filter, so five of each prompt do.
    filtered = image is None and "temporal_flickering" in cast(list[object], dimensions)
    return SuitePrompt(prompt, FLICKERING_VIDEOS if filtered else VIDEOS, image)
