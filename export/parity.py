"""Parity: is an engine's velocity the reference's, at every corner of its profile?

It owns the seeded inputs, the errors and the bound; it knows nothing of how either engine computes.
"""

import math
import time
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import ConfigDict
from torch import Tensor

from export.engines.protocol import Engine
from export.profiles import Shape, ShapeProfile
from model.conditioning import Conditions
from model.config import Config

BOUND = 1e-4
"""Largest absolute error of a float32 engine; velocities are of order 1."""


class ParityFailed(Exception):
    """An engine that does not compute what its reference does; it must not be published."""

    def __init__(self, message: str, report: "ParityReport") -> None:
        super().__init__(message)
        self.report = report


class ShapeParity(Config):
    """One call of each engine on the same inputs."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    shape: Shape
    max_abs_error: float
    """NaN if either velocity is not finite."""
    mean_abs_error: float
    reference_seconds: float
    candidate_seconds: float

    def within(self, bound: float) -> bool:
        return self.max_abs_error <= bound  # a NaN is within nothing


class ParityReport(Config):
    subject: str
    """sha256 of the proven file."""
    bound: float
    seed: int
    shapes: tuple[ShapeParity, ...]

    @property
    def passed(self) -> bool:
        return bool(self.shapes) and all(each.within(self.bound) for each in self.shapes)

    @property
    def worst(self) -> ShapeParity:
        return max(self.shapes, key=lambda each: math.inf if math.isnan(each.max_abs_error) else each.max_abs_error)

    def require_passed(self) -> Self:
        if not self.shapes:
            raise ParityFailed("no shape was compared, so nothing is shown", self)
        if not self.passed:
            worst = self.worst
            raise ParityFailed(
                f"{worst.shape}: the engine is off by {worst.max_abs_error:.3g}, above the bound {self.bound:g}"
                f" ({sum(not each.within(self.bound) for each in self.shapes)} of {len(self.shapes)} shapes fail)",
                self,
            )
        return self


def check_parity(
    reference: Engine,
    candidate: Engine,
    profile: ShapeProfile,
    *,
    subject: str,
    shapes: Sequence[Shape] | None = None,
    bound: float = BOUND,
    seed: int = 0,
) -> ParityReport:
    """Compare the engines at `shapes` (the profile's corners unless given); a ParityFailed carries its report.

    Args:
        subject: sha256 of the file behind `candidate`: what the report proves.
    """
    corners = profile.corners() if shapes is None else tuple(shapes)
    rows = tuple(_compare(reference, candidate, profile, shape, seed) for shape in corners)
    return ParityReport(subject=subject, bound=bound, seed=seed, shapes=rows).require_passed()


def draw_inputs(profile: ShapeProfile, shape: Shape, seed: int) -> tuple[Tensor, Tensor, Conditions]:
    """Latents, timestep and conditions as sampling makes them: unit noise, times over all of [0, 1), padded texts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(name: str) -> Tensor:
        return torch.randn(sizes[name], generator=generator)

    sizes = profile.input_shapes(shape)
    timestep = (torch.arange(shape.batch) + torch.rand(shape.batch, generator=generator)) / shape.batch
    timestep[0] = 0.0  # where every sampling starts
    lengths = torch.randint(1, shape.text_tokens + 1, (shape.batch,), generator=generator)
    lengths[0] = shape.text_tokens
    mask = torch.arange(shape.text_tokens) < lengths[:, None]
    factor = profile.spatial_factor
    micro = torch.tensor([[shape.height * factor, shape.width * factor, 0, 0, 1, shape.frames]], dtype=torch.float32)
    text = normal("text") * mask[:, :, None]
    return normal("latents"), timestep, Conditions(text, mask, normal("pooled"), micro.repeat(shape.batch, 1))


def _compare(reference: Engine, candidate: Engine, profile: ShapeProfile, shape: Shape, seed: int) -> ShapeParity:
    inputs = draw_inputs(profile, shape, seed)
    expected, reference_seconds = _timed(reference, inputs)
    found, candidate_seconds = _timed(candidate, inputs)
    if found.shape != expected.shape:
        raise ValueError(f"{shape}: the engine answers {tuple(found.shape)}, the reference {tuple(expected.shape)}")
    error = (found.double() - expected.double()).abs()
    return ShapeParity(
        shape=shape,
        max_abs_error=float(error.max()),
        mean_abs_error=float(error.mean()),
        reference_seconds=reference_seconds,
        candidate_seconds=candidate_seconds,
    )


def _timed(engine: Engine, inputs: tuple[Tensor, Tensor, Conditions]) -> tuple[Tensor, float]:
    """The second call's time: the first at a shape also pays for its buffers."""
    engine.denoise(*inputs)
    start = time.perf_counter()
    velocity = engine.denoise(*inputs)
    return velocity, time.perf_counter() - start
