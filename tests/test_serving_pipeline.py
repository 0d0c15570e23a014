from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from infra.serving.limits import VideoRequest
from infra.serving.pipeline import DenoiseRow, Diverged, VideoPipeline
from infra.serving.scheduling.cost import CostModel
from infra.serving.scheduling.scheduler import Scheduler
from model.conditioning import Conditions
from model.config import FlowConfig, SamplingConfig
from model.diffusion import as_flow
from model.sampler import Guidance, GuidanceKind, sample_steps
from tests.tiny_server import CLIP, image, request, tiny_pipeline, tiny_recipe


@pytest.fixture(scope="module", params=[False, True], ids=["ode", "sde"])
def pipeline(request: pytest.FixtureRequest) -> VideoPipeline:
    return tiny_pipeline(tiny_recipe(stochastic=request.param))


def finish(pipeline: VideoPipeline, rows: Sequence[DenoiseRow]) -> dict[str, torch.Tensor]:
    scheduler = Scheduler[DenoiseRow](32, CostModel())
    for row in rows:
        scheduler.admit(row)
    while batch := scheduler.next_batch():
        pipeline.advance(batch)
        for row in batch:
            if row.done:
                scheduler.leave(row.job_id)
    return {row.job_id: row.latents for row in rows}


UNLIKE: dict[str, tuple[VideoRequest, dict[str, bytes]]] = {
    "plain": (request(), {}),
    "image": (request("a blue square moves up", seed=8), {"image": image()}),
    "guided": (
        request("a green triangle", guidance_scale=9.0, seed=9, negative_prompt="a red circle"),
        {},
    ),
    "longer": (request("yellow", num_inference_steps=7, flow_shift=3.0, seed=10), {}),
    "unguided": (request("a white square", guidance="none", seed=11, num_inference_steps=5), {}),
    "separate": (
        request("a cyan circle", guidance="separate", guidance_scale=4.0, image_guidance_scale=2.0, seed=12),
        {"image": image()},
    ),
    "separate text": (request("a red square", guidance="separate", image_guidance_scale=3.0, seed=13), {}),
    "large": (request(width=64, height=48, num_frames=4), {}),
}


def test_unlike_rows_in_one_batch_are_what_they_are_alone(pipeline: VideoPipeline) -> None:
    together = finish(pipeline, [pipeline.prepare(name, *job) for name, job in UNLIKE.items()])
    for name, job in UNLIKE.items():
        alone = finish(pipeline, [pipeline.prepare(name, *job)])[name]
        assert torch.isfinite(alone).all()
        assert (together[name] - alone).abs().max() <= 1e-4 * max(1.0, float(alone.abs().max())), name


def test_unlike_rows_share_every_call_whatever_their_guidance_image_and_step(pipeline: VideoPipeline) -> None:
    rows = [pipeline.prepare(name, *job) for name, job in UNLIKE.items() if name != "large"]
    assert len({row.key for row in rows}) == 1
    pipeline.advance([rows[0]])  # now they stand at different steps, and one comes to its last before the others
    calls = CountingVelocity(pipeline)
    scheduler = Scheduler[DenoiseRow](32, CostModel())
    for row in rows:
        scheduler.admit(row)
    while batch := scheduler.next_batch():
        pipeline.advance(batch)
        for row in batch:
            if row.done:
                scheduler.leave(row.job_id)
    calls.stop()
    evaluations = 2  # Heun's
    assert len(calls.rows) == evaluations * max(row.num_steps for row in rows)
    assert calls.rows[0] == sum(row.rows for row in rows) == 4 * 2 + 1 + 2 * 3


class CountingVelocity:
    """Engine rows of each call that `pipeline` makes until `stop`."""

    def __init__(self, pipeline: VideoPipeline) -> None:
        self.rows: list[int] = []
        self._pipeline: VideoPipeline = pipeline
        self._velocity: Any = pipeline.velocity
        pipeline.velocity = self._call

    def _call(self, latents: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        self.rows.append(len(latents))
        return self._velocity(latents, t, conditions)

    def stop(self) -> None:
        self._pipeline.velocity = self._velocity


def test_the_first_frame_is_the_image(pipeline: VideoPipeline) -> None:
    row = pipeline.prepare("image", *UNLIKE["image"])
    finish(pipeline, [row])
    kept = pipeline.decode(row)
    assert kept.shape == (8, 32, 32, 3) and kept.dtype == np.uint8
    coded = pipeline.codec.decode(row.image.latents[:, :1])
    assert torch.equal(row.latents[:, 0], row.image.latents[:, 0])
    assert np.abs((kept[0] / 127.5 - 1) - coded[0, 0].permute(1, 2, 0).numpy()).max() < 0.01
    assert np.abs(kept[0].astype(int) - CLIP[0]).mean() < 12


def test_the_same_seed_gives_the_same_video_and_another_does_not(pipeline: VideoPipeline) -> None:
    first, again, other = (
        finish(pipeline, [pipeline.prepare("job", request(seed=seed), {})])["job"] for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 6.0}, {"negative_prompt": "red"}, {"prompt": "blue"}, {"flow_shift": 4.0}]
)
def test_every_condition_changes_the_video(pipeline: VideoPipeline, changes: dict[str, Any]) -> None:
    plain = finish(pipeline, [pipeline.prepare("job", request(), {})])["job"]
    changed = finish(pipeline, [pipeline.prepare("job", request(**changes), {})])["job"]
    assert (plain - changed).abs().max() > 1e-4


def test_a_row_is_sampled_as_the_sampler_does() -> None:
    pipeline = tiny_pipeline()
    row = pipeline.prepare("job", *UNLIKE["image"])
    config = SamplingConfig(solver="heun", stochastic=False, num_steps=4, guidance_scale=3.0)
    guidance = Guidance(row.conditional, row.null, torch.tensor([3.0]))
    with torch.inference_mode():
        *_, wanted = sample_steps(pipeline.engine.denoise, row.latents, guidance, row.image, config)
    assert torch.equal(finish(pipeline, [row])["job"], wanted)


def test_a_recipe_with_a_step_cache_is_served_with_one_and_asks_the_engine_for_fewer_rows() -> None:
    recipe = tiny_recipe()
    sampling = recipe.sampling.model_copy(update={"step_cache": 0.9})
    pipeline = tiny_pipeline(recipe.model_copy(update={"sampling": sampling}))
    row = pipeline.prepare("job", *UNLIKE["image"])
    config = SamplingConfig(solver="heun", stochastic=False, num_steps=4, guidance_scale=3.0, step_cache=0.9)
    guidance = Guidance(row.conditional, row.null, torch.tensor([3.0]))
    with torch.inference_mode():
        *_, wanted = sample_steps(pipeline.engine.denoise, row.latents, guidance, row.image, config)
    assert torch.equal(finish(pipeline, [row])["job"], wanted)
    assert row.cache.foretold > 0 and row.cache.computed + row.cache.foretold == 2 * 4


@pytest.mark.parametrize("guidance", ["separate", "none"])
def test_every_guidance_is_served_as_the_sampler_draws_it(guidance: GuidanceKind) -> None:
    pipeline = tiny_pipeline()
    row = pipeline.prepare("job", request(guidance=guidance, image_guidance_scale=2.0), {"image": image()})
    config = SamplingConfig(solver="heun", stochastic=False, num_steps=4, guidance=guidance, image_guidance_scale=2.0)
    with torch.inference_mode():
        given = Guidance(row.conditional, row.null, torch.tensor([3.0]))
        *_, wanted = sample_steps(pipeline.engine.denoise, row.latents, given, row.image, config)
    assert torch.equal(finish(pipeline, [row])["job"], wanted)


def test_a_diffusion_network_is_served_along_the_flow_it_implies() -> None:
    recipe = tiny_recipe(task="t2v")
    pipeline = tiny_pipeline(recipe.model_copy(update={"flow": FlowConfig(objective="diffusion")}))
    row = pipeline.prepare("job", *UNLIKE["plain"])
    guidance = Guidance(row.conditional, row.null, torch.tensor([3.0]))
    with torch.inference_mode():
        *_, wanted = sample_steps(as_flow(pipeline.engine.denoise), row.latents, guidance, row.image, recipe.sampling)
    found = finish(pipeline, [row])["job"]
    assert torch.allclose(found, wanted, atol=1e-5)
    plain = tiny_pipeline(recipe)
    assert not torch.allclose(found, finish(plain, [plain.prepare("job", *UNLIKE["plain"])])["job"], atol=1e-2)


def test_an_upload_size_other_than_trained_works_for_every_multiple(pipeline: VideoPipeline) -> None:
    for width, height, frames in ((16, 16, 2), (64, 16, 4), (32, 48, 16)):
        row = pipeline.prepare("job", request(width=width, height=height, num_frames=frames), {})
        finish(pipeline, [row])
        assert pipeline.decode(row).shape == (frames, height, width, 3)


def test_a_failed_call_leaves_every_row_as_it_was(pipeline: VideoPipeline) -> None:
    rows = [pipeline.prepare("good", request(), {}), pipeline.prepare("bad", request("EXPLODE"), {})]
    before = rows[0].latents.clone()
    with pytest.raises(RuntimeError):
        pipeline.advance(rows)
    assert rows[0].step == 0 and torch.equal(rows[0].latents, before)


def test_a_diverged_row_says_so() -> None:
    pipeline = tiny_pipeline()
    row = pipeline.prepare("job", request("NAN"), {})
    row.require_finite()
    pipeline.advance([row])
    with pytest.raises(Diverged, match="job job are not finite after step 1 of 4"):
        row.require_finite()
