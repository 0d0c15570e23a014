"""Drawing videos from the trained flow: guidance, renormalisation, solver steps. Pure functions per step.

Every step takes B unlike rows, each with its own time, step size, guidance scale and clean frames, so a server can
batch videos that stand at different steps. It knows nothing of networks, jobs or decoding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from model.conditioning import Conditions, replace_frames
from model.config import SamplingConfig
from model.flow_matching import interpolate, shift_timesteps
from model.step_cache import StepCache, recall

Network = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(latents [R, T, C, H, W], t [R], conditions of R rows) -> velocity; what an engine or a network offers."""

Solver = Literal["euler", "heun"]
GuidanceKind = Literal["joint", "separate", "none"]
NullFrames = Literal["noised", "zeros"]

PASSES: dict[GuidanceKind, tuple[tuple[bool, bool], ...]] = {
    "joint": ((True, True), (False, False)),
    "separate": ((True, True), (False, True), (False, False)),
    "none": ((True, True),),
}
"""Whether each pass sees the text and the image; a pass is guided away from the one after it."""

FIRST_TIME = 1e-3
"""The SDE's diffusion (1 - t) / t needs t > 0; its first step uses this in its place."""


@dataclass(slots=True, frozen=True)
class Guidance:
    """What pulls each row: conditional against null conditions."""

    conditional: Conditions
    null: Conditions
    """Null text, usually the empty string; what a pass sees of the image is the conditional's, or none of it."""
    scale: Tensor
    """[B]; 1 is the conditional prediction alone. Separate guidance: of the text."""
    renormalize: bool = True
    kind: GuidanceKind | tuple[GuidanceKind, ...] = "joint"
    """Of all rows, or of each."""
    image_scale: Tensor | None = None
    """[B], scale of the image; rows with separate guidance want it, the others do not use it."""
    null_frames: NullFrames = "noised"

    def configured(self, config: SamplingConfig) -> "Guidance":
        """The same conditions and scales, combined as `config` says."""
        own = self.image_scale
        return replace(
            self,
            renormalize=config.renormalize,
            kind=config.guidance,
            image_scale=torch.full_like(self.scale, config.image_guidance_scale) if own is None else own,
            null_frames=config.null_frames,
        )

    @property
    def kinds(self) -> tuple[GuidanceKind, ...]:
        """Of each row."""
        return (self.kind,) * len(self.scale) if isinstance(self.kind, str) else self.kind

    @property
    def members(self) -> dict[tuple[bool, bool], Tensor]:
        """Pass (sees the text, sees the image) -> places int [R] of the rows that have it, conditional first."""
        found = {each: self.rows_of(lambda kind, each=each: each in PASSES[kind]) for each in PASSES["separate"]}
        return {each: rows for each, rows in found.items() if len(rows)}

    def rows_of(self, wanted: Callable[[GuidanceKind], bool]) -> Tensor:
        """Places int [R] of the rows of wanted kinds."""
        places = [place for place, kind in enumerate(self.kinds) if wanted(kind)]
        return torch.tensor(places, dtype=torch.int64, device=self.scale.device)

    def rows(self, index: Tensor) -> "Guidance":
        """Of the rows `index` int [R]."""
        return replace(
            self,
            conditional=self.conditional.rows(index),
            null=self.null.rows(index),
            scale=self.scale[index],
            kind=self.kind if isinstance(self.kind, str) else tuple(self.kind[int(row)] for row in index),
            image_scale=None if self.image_scale is None else self.image_scale[index],
        )

    def scales(self, kind: GuidanceKind, index: Tensor) -> list[Tensor]:
        """[R] of the rows `index` for each pass of `kind` but its last: how far it is followed from the next."""
        if kind == "none":
            return []
        if kind == "joint":
            return [self.scale[index]]
        if self.image_scale is None:
            raise ValueError("image_scale is None; guidance 'separate' wants one a row")
        return [self.scale[index], self.image_scale[index]]

    def conditions(self, with_text: bool, with_image: bool) -> Conditions:
        """Of a pass."""
        own = self.conditional
        chosen = own if with_text else self.null
        if own.image is None or own.image_given is None:
            return chosen
        return chosen.with_image(own.image, own.image_given & with_image)


@dataclass(slots=True, frozen=True)
class ImageCondition:
    """Frames each row must keep. Rows without any are text-to-video."""

    latents: Tensor
    """Clean latents [B, T, C, H, W]; anything where `frame_mask` is False."""
    frame_mask: Tensor
    """bool [B, T], True where the frame is clean."""
    noise: Tensor
    """[B, T, C, H, W]: start of the straight path that the clean frames follow in the null branch."""

    def rows(self, index: Tensor) -> "ImageCondition":
        """Of the rows `index` int [R]."""
        return ImageCondition(self.latents[index], self.frame_mask[index], self.noise[index])


@dataclass(slots=True, frozen=True)
class GuidingVelocity:
    """A network that combines the passes of a video itself."""

    call: Callable[[Tensor, Tensor, Conditions, Guidance, ImageCondition], Tensor]
    """What `pass_rows` gives, and how to combine it -> guided velocities, those of the conditional rows first."""


Velocity = Network | GuidingVelocity
"""What the sampler follows."""


def timestep_schedule(num_steps: int, shift: float = 1.0) -> Tensor:
    """Flow times [num_steps + 1] from 0 (noise) to 1 (data)."""
    return shift_timesteps(torch.linspace(0.0, 1.0, num_steps + 1), shift)


def guide(predictions: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Classifier-free guidance over passes, each [B, ...] with fewer conditions than the one before it.

    Two passes are JIT-CFG (paper 2.3.2), null + s (conditional - null); three are SIT-CFG (paper 3.4.2),
    null + s_image (image - null) + s_text (conditional - image); one is itself.
    """
    guided = predictions[-1]
    for place in reversed(range(len(scales))):
        guided = guided + _per_row(scales[place]) * (predictions[place] - predictions[place + 1])
    return guided


def renormalize(guided: Tensor, conditional: Tensor, frame_mask: Tensor) -> Tensor:
    """CFG-Renorm (paper App. A): the guided velocity at the conditional one's norm, clean frames left out."""
    counted = (~frame_mask)[:, :, None, None, None]
    wanted = (conditional * counted).square().flatten(1).sum(1).sqrt()
    found = (guided * counted).square().flatten(1).sum(1).sqrt().clamp_min(1e-12)
    return guided * _per_row(wanted / found)


def pass_rows(
    latents: Tensor, t: Tensor, guidance: Guidance, image: ImageCondition
) -> tuple[Tensor, Tensor, Conditions]:
    """What a network is called with for B rows: each once a pass of its kind, in the order of `guidance.members`."""
    members = guidance.members
    clean = replace_frames(latents, image.latents, image.frame_mask)
    null = replace_frames(latents, _null_frames(image, t, guidance.null_frames), image.frame_mask)
    return (
        torch.cat([(clean if each[1] else null)[rows] for each, rows in members.items()]),
        torch.cat([t[rows] for rows in members.values()]),
        Conditions.stack([guidance.conditions(*each).rows(rows) for each, rows in members.items()]),
    )


def guided_velocity(
    velocity: Velocity, latents: Tensor, t: Tensor, guidance: Guidance, image: ImageCondition
) -> Tensor:
    """One call of `velocity` for B rows, whatever their guidance, with the rows of all passes, combined."""
    called = pass_rows(latents, t, guidance, image)
    if isinstance(velocity, GuidingVelocity):
        return velocity.call(*called, guidance, image)[: len(latents)]
    members = guidance.members
    answers = torch.split(velocity(*called), [len(rows) for rows in members.values()])
    predicted = dict(zip(members, answers, strict=True))
    conditional = predicted[True, True]
    guided = conditional
    for kind in sorted(set(guidance.kinds) - {"none"}):
        rows = guidance.rows_of(lambda each, wanted=kind: each == wanted)
        its = [predicted[each][torch.isin(members[each], rows)] for each in PASSES[kind]]
        guided = guided.index_copy(0, rows, guide(its, guidance.scales(kind, rows)))
    return renormalize(guided, conditional, image.frame_mask) if guidance.renormalize else guided


def _null_frames(image: ImageCondition, t: Tensor, kind: NullFrames) -> Tensor:
    """What stands at the given frames where a pass may not see them."""
    return interpolate(image.latents, image.noise, t) if kind == "noised" else torch.zeros_like(image.latents)


@dataclass(slots=True, frozen=True)
class Step:
    """One solver update of B rows, from `start` [B] to `end` [B]."""

    start: Tensor
    end: Tensor
    solver: Solver = "euler"
    diffusion_noise: Tensor | None = None
    """Standard normal [B, T, C, H, W] for the reverse-time SDE; None integrates the ODE, as rows that end at 1 do."""


def denoise_step(velocity: Velocity, latents: Tensor, step: Step, guidance: Guidance, image: ImageCondition) -> Tensor:
    """Latents at `step.end`. Euler calls the network once, Heun twice."""
    return _moved(lambda x, t: guided_velocity(velocity, x, t, guidance, image), latents, step, image)


def cached_step(
    velocity: Velocity, latents: Tensor, step: Step, guidance: Guidance, image: ImageCondition, cache: StepCache
) -> tuple[Tensor, StepCache]:
    """`denoise_step` in which a velocity that `cache` may foretell is not computed; a call without any is not made.

    Rows whose threshold is 0 are computed always, to the bit as without a cache. A row's first two velocities and that
    of its last step are computed whatever its threshold.
    """
    last = step.end >= 1.0

    def compute(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        if len(rows) == len(latents):
            return guided_velocity(velocity, x, t, guidance, image)
        return guided_velocity(velocity, x, t, guidance.rows(rows), image.rows(rows))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        nonlocal cache
        v, cache = recall(compute, x, t, cache, free=~image.frame_mask, must=last & (t == step.start))
        return v

    return _moved(guided, latents, step, image), cache


def _moved(guided: Callable[[Tensor, Tensor], Tensor], latents: Tensor, step: Step, image: ImageCondition) -> Tensor:
    """Latents at `step.end` along `guided`, the velocity at (x [B, T, C, H, W], t [B])."""
    size = _per_row(step.end - step.start)
    diffuses = _per_row(step.end < 1.0)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v = guided(x, t)
        if step.diffusion_noise is None:
            return v
        return torch.where(diffuses, v + _per_row(_diffusion(t)) * _score(v, x, t), v)

    x = latents
    if step.diffusion_noise is not None:
        noise = (2 * _per_row(_diffusion(step.start)) * size).sqrt() * step.diffusion_noise
        x = torch.where(diffuses, x + noise, x)
    slope = drift(x, step.start)
    moved = x + size * slope
    if step.solver == "heun":
        last = step.end >= 1.0  # the score has no limit at t = 1, and the ODE's slope there is unseen in training
        second = drift(moved, step.end.clamp_max(1 - FIRST_TIME))
        moved = torch.where(_per_row(last), moved, x + size * (slope + second) / 2)
    return replace_frames(moved, interpolate(image.latents, image.noise, step.end), image.frame_mask)


def sample_steps(
    velocity: Velocity,
    noise: Tensor,
    guidance: Guidance,
    image: ImageCondition,
    config: SamplingConfig,
    *,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Latents [B, T, C, H, W] after each denoise step, from noise of that shape; the last are at t = 1.

    Clean frames come back as given. `config` says how the passes of `guidance` are combined; the scales a row has in
    `guidance` stay. With `config.step_cache` some of the velocities are foretold.
    """
    guidance = guidance.configured(config)
    cache = StepCache.empty(noise, torch.full((len(noise),), config.step_cache)) if config.step_cache else None
    latents = replace_frames(noise, image.noise, image.frame_mask)
    schedule = timestep_schedule(config.num_steps, shift)
    for start, end in pairwise(schedule):
        rows = noise.shape[0]
        diffusion = torch.randn(noise.shape, generator=generator) if config.stochastic and end < 1.0 else None
        step = Step(start.expand(rows), end.expand(rows), config.solver, diffusion)
        if cache is None:
            latents = denoise_step(velocity, latents, step, guidance, image)
        else:
            latents, cache = cached_step(velocity, latents, step, guidance, image, cache)
        yield latents


def no_image(latents: Tensor) -> ImageCondition:
    """Text-to-video: no frame of `latents` [B, T, C, H, W] is clean."""
    mask = torch.zeros(latents.shape[:2], dtype=torch.bool, device=latents.device)
    return ImageCondition(torch.zeros_like(latents), mask, torch.zeros_like(latents))


def _diffusion(t: Tensor) -> Tensor:
    """SiT's SBDM diffusion for the linear path, (1 - t) / t."""
    return (1 - t) / t.clamp_min(FIRST_TIME)


def _score(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Score from velocity (paper App. A): (t v - x) / (1 - t)."""
    rate = _per_row(t)
    return (rate * v - x) / (1 - rate)


def _per_row(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)
