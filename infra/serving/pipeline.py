"""One served model: a request becomes a row, rows become less noisy together, a finished row becomes frames.

It owns the engine, the codec and the text encoder of an engine bundle; it knows nothing of jobs, files or clients.
All that is random about a row comes from its request's seed, so a video does not depend on its batch mates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from export.engines.opening import open_bundle
from export.engines.protocol import Engine
from export.guidance import velocity_of
from export.profiles import ShapeProfile
from infra.serving import media
from infra.serving.jobs.table import KeptLatents
from infra.serving.limits import ENGINE_ROWS, VideoRequest, cost_key
from model.conditioning import Conditions, first_frames, micro_conditions
from model.config import SamplingConfig
from model.generation import Clip, to_clips, to_frames
from model.recipe import StageRecipe
from model.sampler import (
    Guidance,
    GuidanceKind,
    ImageCondition,
    Solver,
    Step,
    cached_step,
    no_image,
    timestep_schedule,
)
from model.step_cache import StepCache
from model.text import TextEncoder, load_text_encoder
from model.vae import FrameCodec, load_codec

GOLDEN = "golden.safetensors"
"""Of an engine bundle."""


class Diverged(ArithmeticError):
    """A row whose latents are no longer finite."""


@dataclass(slots=True)
class DenoiseRow:
    """A video on its way from noise to data."""

    job_id: str
    request: VideoRequest
    latents: Tensor
    """[1, T, C, h, w] at `schedule[step]`."""
    schedule: Tensor
    """Flow times [steps + 1]."""
    conditional: Conditions
    null: Conditions
    image: ImageCondition
    sampling: SamplingConfig
    cache: StepCache
    """What it remembers where `sampling.step_cache` is on."""
    engine: str
    """Digest of the engine that draws it."""
    source: Clip | None = None
    """Frames that the video continues; its last `request.given_frames` are the clean first ones."""
    step: int = 0
    client: str = ""
    priority: int = 0
    deadline_at: float | None = None
    created_at: float = 0.0

    @property
    def image_guidance_scale(self) -> float:
        asked = self.request.image_guidance_scale
        return self.sampling.image_guidance_scale if asked is None else asked

    @property
    def rows(self) -> int:
        """Of the engine, in its next call."""
        return ENGINE_ROWS[self.request.guidance]

    @property
    def steps_left(self) -> int:
        return self.num_steps - self.step

    @property
    def cost_key(self) -> str:
        return cost_key(self.request)

    @property
    def num_steps(self) -> int:
        return self.request.num_inference_steps

    @property
    def done(self) -> bool:
        return self.step == self.num_steps

    @property
    def progress(self) -> int:
        """Percent; 100 is for a video that can be downloaded."""
        return min(99, 100 * self.step // self.num_steps)

    @property
    def key(self) -> tuple[str, torch.Size, Solver]:
        """Rows with equal keys can share a call of the engine."""
        return self.engine, self.latents.shape, self.sampling.solver

    def noise(self) -> Tensor:
        """Standard normal for the next update, the same whenever it is drawn."""
        return _normal(self.latents.shape, self.request.seed, stream=1 + self.step)

    def kept(self, step: int, latents: Tensor) -> KeptLatents:
        """The row as it stood after that step, to go on from."""
        return KeptLatents(self.engine, step, save({"latents": latents.contiguous()}))

    def resume(self, kept: KeptLatents) -> bool:
        """Go on from there, as if it had never stopped; False if another engine, or one without a name, kept them."""
        if not self.engine or kept.engine != self.engine:
            return False
        self.latents, self.step = load(kept.data)["latents"], kept.step
        return True

    def require_finite(self) -> None:
        if not bool(torch.isfinite(self.latents).all()):
            raise Diverged(f"latents of job {self.job_id} are not finite after step {self.step} of {self.num_steps}")


class VideoPipeline:
    def __init__(
        self,
        engine: Engine,
        codec: FrameCodec,
        text_encoder: TextEncoder,
        recipe: StageRecipe,
        *,
        profile: ShapeProfile | None = None,
        digest: str = "",
        golden: Path | None = None,
    ) -> None:
        """`profile` bounds what the engine takes, None if it takes any shape; `digest` names engine and weights.

        `golden` is what it should draw, see `golden`.
        """
        self.engine = engine
        self.velocity = velocity_of(engine, recipe.flow)
        self.profile = profile
        self.digest = digest
        self.golden = golden
        self.codec = codec
        self.text_encoder = text_encoder
        self.recipe = recipe

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model of an engine bundle, after every byte of it was checked."""
        bundle, engine, profile = open_bundle(folder)
        recipe = bundle.recipe
        return cls(
            engine,
            load_codec(folder, recipe.vae),
            load_text_encoder(recipe.text),
            recipe,
            profile=profile,
            digest=bundle.digest,
            golden=bundle.files.get(GOLDEN),
        )

    @torch.inference_mode()
    def prepare(self, job_id: str, request: VideoRequest, inputs: Mapping[str, bytes]) -> DenoiseRow:
        """The row at pure noise, with what `inputs` give as its clean first frames.

        Roles: "image", a PNG of the video's size; "video", the frames that it continues, see `media.read_frames`.
        """
        factor = self.codec.spatial_factor
        shape = (1, request.num_frames, self.codec.latent_channels, request.height // factor, request.width // factor)
        noise = _normal(shape, request.seed, stream=0)
        embedding = self.text_encoder.encode([request.prompt, request.negative_prompt])
        video = self.recipe.video.model_copy(
            update={"height": request.height, "width": request.width, "num_frames": request.num_frames}
        )
        both = Conditions.of(embedding, micro_conditions(video, batch=2))
        source = media.read_frames(inputs["video"]) if "video" in inputs else None
        given = media.read_image(inputs["image"]) if "image" in inputs else None
        if source is not None:
            given = source[len(source) - request.given_frames :]
        image = no_image(noise) if given is None else self._image_condition(given, noise)
        conditional = both.rows(slice(0, 1))
        if self.profile is not None and self.profile.takes_image:
            conditional = conditional.with_image(image.latents[:, 0], image.frame_mask[:, 0])
        return DenoiseRow(
            job_id=job_id,
            request=request,
            latents=noise,
            schedule=timestep_schedule(request.num_inference_steps, request.flow_shift),
            conditional=conditional,
            null=both.rows(slice(1, 2)),
            image=image,
            sampling=self.recipe.sampling,
            cache=StepCache.empty(noise, torch.tensor([self.recipe.sampling.step_cache])),
            engine=self.digest,
            source=source,
        )

    @torch.inference_mode()
    def advance(self, rows: Sequence[DenoiseRow]) -> None:
        """One denoise step of rows whose keys are equal; a failure leaves every row as it was."""
        sampling = rows[0].sampling
        step = Step(
            start=torch.stack([row.schedule[row.step] for row in rows]),
            end=torch.stack([row.schedule[row.step + 1] for row in rows]),
            solver=sampling.solver,
            diffusion_noise=torch.cat([row.noise() for row in rows]) if sampling.stochastic else None,
        )
        kinds: list[GuidanceKind] = [row.request.guidance for row in rows]
        guidance = Guidance(
            conditional=Conditions.stack([row.conditional for row in rows]),
            null=Conditions.stack([row.null for row in rows]),
            scale=torch.tensor([row.request.guidance_scale for row in rows]),
            renormalize=sampling.renormalize,
            kind=tuple(kinds),
            image_scale=torch.tensor([row.image_guidance_scale for row in rows]),
            null_frames=sampling.null_frames,
        )
        image = ImageCondition(
            latents=torch.cat([row.image.latents for row in rows]),
            frame_mask=torch.cat([row.image.frame_mask for row in rows]),
            noise=torch.cat([row.image.noise for row in rows]),
        )
        latents = torch.cat([row.latents for row in rows])
        cache = StepCache.stack([row.cache for row in rows])
        moved, cache = cached_step(self.velocity, latents, step, guidance, image, cache)
        for place, row in enumerate(rows):
            row.latents, row.cache = moved[place : place + 1], cache.rows(slice(place, place + 1))
            row.step += 1

    @torch.inference_mode()
    def decode(self, row: DenoiseRow) -> Clip:
        """Pixels of a finished row: what it continues, and what was drawn after the given frames."""
        request = row.request
        drawn = to_clips(self.codec.decode(row.latents))[0][: request.num_frames - request.surplus_frames]
        return drawn if row.source is None else np.concatenate([row.source, drawn[request.given_frames :]])

    @torch.inference_mode()
    def preview(self, row: DenoiseRow, step: int, latents: Tensor, before: Tensor) -> Clip:
        """The middle frame [1, H, W, 3] of the video that `row` was heading for at `step`, one step after `before`."""
        start, end = row.schedule[step - 1], row.schedule[step]
        middle = slice(latents.shape[1] // 2, latents.shape[1] // 2 + 1)
        heading = latents + (1 - end) / (end - start) * (latents - before)
        return to_clips(self.codec.decode(heading[:, middle]))[0]

    def _image_condition(self, given: Clip, noise: Tensor) -> ImageCondition:
        latents = torch.zeros_like(noise)
        latents[:, : len(given)] = self.codec.encode(to_frames([given]))
        return ImageCondition(latents, first_frames(1, noise.shape[1], count=len(given)), noise)


def _normal(shape: Sequence[int], seed: int, *, stream: int) -> Tensor:
    """Standard normal that depends on seed and stream alone; drawn on the CPU, so on no device either."""
    state = int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0])
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(state & (2**63 - 1)))
