"""Tasks: which frames of a clip are given clean. That alone tells them apart; network, loss and sampler are the same.

It owns the choice of frames: for training, a task for each clip; for drawing, a plan of passes that lead from the
frames a user gives to the frames he gets. It knows nothing of noise, networks, pixels or files.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from model.config import SamplingConfig, Task, VideoConfig
from model.recipe import StageRecipe

TASKS: tuple[Task, ...] = get_args(Task)
LONG_VIDEO = "long_video"
PLANNED: tuple[str, ...] = (*TASKS, LONG_VIDEO)
"""What can be drawn: every task by itself, and `long_video`, which chains `keyframes` with `interpolation`."""
TEXTLESS = frozenset[str]({"multiview"})
"""Tasks whose text is always the empty string (paper App. J.3)."""
_SAMPLING: Mapping[str, Mapping[str, object]] = {"multiview": {"guidance_scale": 3.5, "null_frames": "zeros"}}
"""Where a task is drawn otherwise than its recipe says (paper App. J.3)."""


def given_frames(recipe: StageRecipe, task: Task) -> tuple[int, ...]:
    """Frames of a clip that `task` gives (paper 2.3.1, 5, App. J); all others are drawn."""
    num_frames = recipe.video.num_frames
    given: dict[Task, Sequence[int]] = {
        "t2i": (),
        "t2v": (),
        "ti2v": (0,),
        "keyframes": (0,),
        "prediction": range(recipe.conditioning.prediction_frames),
        "interpolation": (0, num_frames - 1),
        "upsampling": range(0, num_frames, 2),
        "multiview": range(recipe.network.temporal_patch_size),
    }
    if len(given[task]) >= num_frames:
        raise ValueError(
            f"task '{task}' gives {len(given[task])} frames and leaves none to draw of video.num_frames {num_frames};"
            " use longer clips"
        )
    return tuple(given[task])


def frame_mask(recipe: StageRecipe, task: Task) -> Tensor:
    """bool [T], True where `task` gives the frame."""
    mask = torch.zeros(recipe.video.num_frames, dtype=torch.bool)
    mask[list(given_frames(recipe, task))] = True
    return mask


def frame_stride(video: VideoConfig, task: Task) -> int:
    """Source frames from one frame of a clip to the next; a network is told it as a micro-condition."""
    return {"keyframes": video.keyframe_stride, "multiview": 1}.get(task, video.frame_stride)


def source_frames(video: VideoConfig, task: Task, temporal_patch_size: int) -> tuple[int, ...]:
    """Where each frame of a training clip stands in its source, counted from the clip's first frame.

    The input view of `multiview` is repeated until it fills the first token: the paper's 7 views are 8 frames where
    a token covers 2, and no token mixes the given view with a drawn one.
    """
    repeats = temporal_patch_size - 1 if task == "multiview" else 0
    stride = frame_stride(video, task)
    return tuple(max(0, frame - repeats) * stride for frame in range(video.num_frames))


def task_of(recipe: StageRecipe, number: int) -> Task:
    """The task that clip `number` of the run is trained as."""
    return draw_task(recipe.tasks, recipe.training.seed, number)


def draw_task(weights: Mapping[Task, float], seed: int, number: int) -> Task:
    """A task by its weight; a function of the seed and the clip's number alone, with a random stream of its own."""
    tasks: list[Task] = [task for task in TASKS if task in weights]
    digest = hashlib.blake2b(f"{seed}:task:{number}".encode(), digest_size=8).digest()
    left = int.from_bytes(digest) / 2**64 * sum(weights.values())
    for task in tasks[:-1]:
        left -= weights[task]
        if left < 0:
            return task
    return tasks[-1]


def evaluated(recipe: StageRecipe) -> tuple[Task, ...]:
    """The tasks a trained stage is measured on: its own, and T2V where TI2V's image dropout has taught it."""
    wanted = set(recipe.tasks) | ({"t2v"} if "ti2v" in recipe.tasks else set[Task]())
    return tuple(task for task in TASKS if task in wanted)


@dataclass(slots=True, frozen=True)
class Pass:
    """One clip to draw. A plan's frames have places: first those of the user, then those that passes put there."""

    given: tuple[tuple[int, int], ...]
    """(frame of the clip, place that it is read from)."""
    kept: tuple[tuple[int, int], ...]
    """(frame of the clip, place that it is put at); the other frames are dropped."""
    frame_stride: int


@dataclass(slots=True, frozen=True)
class Plan:
    """From a user's frames to the frames he gets."""

    task: str
    num_inputs: int
    """Frames the user gives, at places 0, 1, …"""
    rounds: tuple[tuple[Pass, ...], ...]
    """One after the other; passes of one round read nothing from each other, so they may share a batch."""
    returned: tuple[int, ...]
    """Places of the frames the user gets, in order."""
    sampling: SamplingConfig
    takes_text: bool


def plan(recipe: StageRecipe, task: str, num_inputs: int) -> Plan:
    """How `task` is drawn from `num_inputs` given frames, by a network of this recipe; trained for it or not."""
    if task not in PLANNED:
        raise ValueError(f"unknown task '{task}'; use one of {', '.join(PLANNED)}")
    video = recipe.video
    if (task == "t2i") != (video.num_frames == 1):
        able = "only task t2i" if video.num_frames == 1 else "any task but t2i"
        raise ValueError(f"task '{task}': stage '{recipe.name}' draws {video.num_frames} frames, so {able}")
    _check_inputs(recipe, task, num_inputs)
    if task == LONG_VIDEO:
        rounds, returned = _long_video(recipe, num_inputs)
    elif task == "upsampling":
        rounds, returned = _upsampling(recipe, num_inputs)
    else:
        rounds, returned = _clip(recipe, _named(task), num_inputs)
    _check_carried(recipe, task, rounds)
    return Plan(task, num_inputs, rounds, returned, sampling_of(recipe, task), takes_text=task not in TEXTLESS)


def sampling_of(recipe: StageRecipe, task: str) -> SamplingConfig:
    """How `task` is drawn: as the recipe says, but for what the task itself wants."""
    return SamplingConfig.model_validate({**recipe.sampling.model_dump(), **_SAMPLING.get(task, {})})


_Drawn = tuple[tuple[tuple[Pass, ...], ...], tuple[int, ...]]
"""Rounds, and the places returned."""


def _clip(recipe: StageRecipe, task: Task, num_inputs: int) -> _Drawn:
    """One pass. The repeated input view of `multiview` comes from one place and is returned once."""
    frames = range(recipe.video.num_frames)
    repeats = recipe.network.temporal_patch_size - 1 if task == "multiview" else 0
    given = given_frames(recipe, task) if num_inputs else ()
    clip = Pass(
        given=tuple((frame, min(place, num_inputs - 1)) for place, frame in enumerate(given)),
        kept=tuple((frame, num_inputs + frame) for frame in frames),
        frame_stride=frame_stride(recipe.video, task),
    )
    return ((clip,),), tuple(num_inputs + frame for frame in frames[repeats:])


def _upsampling(recipe: StageRecipe, num_inputs: int) -> _Drawn:
    """A frame after every given one, in clips that overlap by a given frame at least; the later clip's frames stay.

    So each drawn frame stands between two given ones, but for the last of the film where clips are of even length.
    """
    length, given = recipe.video.num_frames, given_frames(recipe, "upsampling")
    film = 2 * num_inputs - length % 2
    starts = [*range(0, film - length, max(2, 2 * (len(given) - 1))), film - length]
    ends = [*starts[1:], film]
    passes = tuple(
        Pass(
            given=tuple((frame, (start + frame) // 2) for frame in given),
            kept=tuple((frame, num_inputs + start + frame) for frame in range(min(length, end - start))),
            frame_stride=frame_stride(recipe.video, "upsampling"),
        )
        for start, end in zip(starts, ends, strict=True)
    )
    return (passes,), tuple(range(num_inputs, num_inputs + film))


def _long_video(recipe: StageRecipe, num_inputs: int) -> _Drawn:
    """Keyframes, then a clip between each two (paper 5): 20 keyframes give 19 x 20 = 380 frames.

    A segment begins and ends with its keyframes, so that a keyframe between two segments is returned twice.
    """
    length, ends = recipe.video.num_frames, given_frames(recipe, "interpolation")
    (keyframes,), places = _clip(recipe, "keyframes", num_inputs)
    first = num_inputs + length
    segments = tuple(
        Pass(
            given=tuple(zip(ends, places[index : index + 2], strict=True)),
            kept=tuple((frame, first + index * length + frame) for frame in range(length)),
            frame_stride=frame_stride(recipe.video, "interpolation"),
        )
        for index in range(length - 1)
    )
    return (keyframes, segments), tuple(range(first, first + (length - 1) * length))


def input_counts(recipe: StageRecipe, task: str) -> tuple[int, int | None]:
    """The fewest and the most frames that a user gives; None is any number."""
    if task in ("keyframes", LONG_VIDEO):
        return 0, 1
    if task == "multiview":
        return 1, 1
    count = len(given_frames(recipe, _named(task)))
    return count, None if task == "upsampling" else count


def _check_inputs(recipe: StageRecipe, task: str, num_inputs: int) -> None:
    least, most = input_counts(recipe, task)
    if num_inputs < least or (most is not None and num_inputs > most):
        wanted = f"at least {least}" if most is None else f"{least}" if least == most else f"{least} or {most}"
        raise ValueError(
            f"task '{task}' of stage '{recipe.name}' takes {wanted} given frames, not {num_inputs}; its clips have"
            f" {recipe.video.num_frames} frames"
        )


def _check_carried(recipe: StageRecipe, task: str, rounds: Sequence[Sequence[Pass]]) -> None:
    """A network whose training had no frame replacement takes no frame but the first, and that as a condition."""
    given = {frame for passes in rounds for one in passes for frame, _ in one.given}
    if given and recipe.flow.objective == "diffusion":
        raise ValueError(f"task '{task}' gives frames, which flow.objective 'diffusion' of '{recipe.name}' cannot keep")
    if given - {0} and not recipe.conditioning.frame_replacement:
        raise ValueError(
            f"task '{task}' gives frames {sorted(given)}; stage '{recipe.name}' has conditioning.frame_replacement ="
            " false and takes the first frame only"
        )


def _named(task: str) -> Task:
    return next(known for known in TASKS if known == task)
