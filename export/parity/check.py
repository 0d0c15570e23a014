"""Parity: does an engine compute what PyTorch in float32 does, in one call, along a trajectory, and row by row?

It owns what is compared and in which order; it knows nothing of how either engine computes.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from export.engines.protocol import Engine
from export.guidance import velocity_of
from export.parity.inputs import Call, ParityInputs
from export.parity.picture import Frames, draw
from export.parity.report import BOUNDS, CallParity, ParityReport, RowParity, TrajectoryParity
from export.profiles import Shape
from model.generation import to_clips
from model.sampler import PASSES, sample_steps
from model.vae import psnr

SHORT = 4
"""Steps of a trajectory at the corners; at the usual shape it has all of the recipe's."""
EQUAL_DB = 200.0
"""PSNR of frames that are equal: JSON has no infinity."""
ROWS = 4
"""Unlike rows that are compared with each alone."""


def check_parity(
    reference: Engine,
    candidate: Engine,
    inputs: ParityInputs,
    *,
    subject: str,
    precision: str = "fp32",
    seed: int = 0,
    picture: Path | None = None,
) -> ParityReport:
    """Everything that an engine must show before it is published; a ParityFailed carries its report.

    Args:
        subject: sha256 of the file behind `candidate`: what the report proves.
        precision: whose bounds hold, see `report.BOUNDS`.
        picture: a PNG of the errors and the frames, written whether they agree or not.
    """
    profile = inputs.profile
    report = check_calls(
        reference, candidate, inputs, shapes=profile.corners(), subject=subject, precision=precision, seed=seed
    )
    usual, pair = compare_trajectories(reference, candidate, inputs, _two_videos(inputs), seed, num_steps=None)
    corners = [shape for shape in profile.corners() if shape != profile.opt]
    others = [compare_trajectories(reference, candidate, inputs, shape, seed, num_steps=SHORT)[0] for shape in corners]
    rows = compare_rows(candidate, inputs, seed)
    report = report.model_copy(update={"trajectories": (usual, *others), "rows": (rows,)})
    if picture is not None:
        draw(report, pair, picture)
    return report.require_passed()


def check_calls(
    reference: Engine,
    candidate: Engine,
    inputs: ParityInputs,
    *,
    shapes: Sequence[Shape],
    subject: str = "",
    precision: str = "fp32",
    seed: int = 0,
) -> ParityReport:
    """One call of both engines at each shape, not yet judged."""
    calls = tuple(_compare(reference, candidate, inputs.call(shape, seed), shape) for shape in shapes)
    return ParityReport(subject=subject, precision=precision, bounds=BOUNDS[precision], seed=seed, calls=calls)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; NaN if either is not finite."""
    difference = (found.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-12))


def _compare(reference: Engine, candidate: Engine, call: Call, shape: Shape) -> CallParity:
    expected, reference_seconds = _timed(reference, call)
    found, candidate_seconds = _timed(candidate, call)
    if found.shape != expected.shape:
        raise ValueError(f"{shape}: the engine answers {tuple(found.shape)}, the reference {tuple(expected.shape)}")
    return CallParity(
        shape=shape,
        max_abs_error=float((found.double() - expected.double()).abs().max()),
        relative_error=relative_error(found, expected),
        reference_seconds=reference_seconds,
        candidate_seconds=candidate_seconds,
    )


def compare_trajectories(
    reference: Engine, candidate: Engine, inputs: ParityInputs, shape: Shape, seed: int, num_steps: int | None
) -> tuple[TrajectoryParity, Frames]:
    """Both engines from the same noise to videos, and the decoded frames of both, empty without a codec."""
    expected, found = (_latents(engine, inputs, shape, seed, num_steps) for engine in (reference, candidate))
    errors = tuple(relative_error(one, other) for one, other in zip(found, expected, strict=True))
    if inputs.codec is None:
        return TrajectoryParity(shape=shape, errors=errors, psnr_db=None), ([], [])
    ours, theirs = inputs.codec.decode(expected[-1]), inputs.codec.decode(found[-1])
    agreement = min(psnr(ours, theirs), EQUAL_DB)
    return TrajectoryParity(shape=shape, errors=errors, psnr_db=agreement), (to_clips(ours), to_clips(theirs))


def _two_videos(inputs: ParityInputs) -> Shape:
    """The usual shape with rows for two videos, one of which keeps its first frame."""
    rows = 2 * len(PASSES[inputs.recipe.sampling.guidance])
    return inputs.profile.opt.model_copy(update={"batch": min(rows, inputs.profile.max.batch)})


def _latents(engine: Engine, inputs: ParityInputs, shape: Shape, seed: int, num_steps: int | None) -> list[Tensor]:
    """After each step."""
    recipe, videos = inputs.recipe, inputs.videos(shape, seed)
    sampling = recipe.sampling if num_steps is None else recipe.sampling.model_copy(update={"num_steps": num_steps})
    velocity = velocity_of(engine, recipe.flow)
    generator = torch.Generator().manual_seed(seed)
    steps = sample_steps(
        velocity, videos.noise, videos.guidance, videos.image, sampling, shift=recipe.flow.shift, generator=generator
    )
    return list(steps)


def compare_rows(engine: Engine, inputs: ParityInputs, seed: int) -> RowParity:
    """A video must not depend on its batch mates."""
    shape = inputs.profile.opt.model_copy(update={"batch": min(ROWS, inputs.profile.max.batch)})
    latents, timestep, conditions = inputs.call(shape, seed)
    together = engine.denoise(latents, timestep, conditions)
    alone = [
        engine.denoise(latents[row], timestep[row], conditions.rows(row))
        for row in (slice(place, place + 1) for place in range(shape.batch))
    ]
    return RowParity(rows=shape.batch, max_abs_error=float((together - torch.cat(alone)).abs().max()))


def _timed(engine: Engine, call: Call) -> tuple[Tensor, float]:
    """The second call's time: the first at a shape also pays for its buffers."""
    engine.denoise(*call)
    start = time.perf_counter()
    velocity = engine.denoise(*call)
    return velocity, time.perf_counter() - start
