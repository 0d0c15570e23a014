"""Parity: what an engine must show, on what, and that an engine with a fault does not pass."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from export.engines.protocol import Engine
from export.engines.torch import TorchEngine
from export.parity.check import check_calls, check_parity, compare_rows, compare_trajectories
from export.parity.inputs import ParityInputs
from export.parity.report import BOUNDS, ParityFailed, ParityReport
from export.profiles import Shape, ShapeProfile
from model.conditioning import Conditions
from model.data.moving_shapes import generate
from model.generation import to_frames
from model.text import load_text_encoder
from model.vae import PatchPca
from tests.tiny_export import Exported, make_network, make_recipe

Arguments = tuple[Tensor, Tensor, Conditions]


def shown_first(conditions: Conditions) -> Conditions:
    """Pooled text and micro-conditions of the first row for all."""
    first = torch.zeros(len(conditions.pooled), dtype=torch.long)
    return replace(conditions, pooled=conditions.pooled[first], micro=conditions.micro[first])


def not_clean(latents: Tensor) -> Tensor:
    return torch.cat([latents[:, 1:2], latents[:, 1:]], dim=1)


INPUT_FAULTS: dict[str, Callable[[Tensor, Tensor, Conditions], Arguments]] = {
    "rows swapped": lambda x, t, given: (x, t, given.rows(torch.arange(len(x)).flip(0))),
    "pooled of the first row for all": lambda x, t, given: (x, t, shown_first(given)),
    "time of the first row for all": lambda x, t, given: (x, t[:1].expand_as(t), given),
    "time runs backwards": lambda x, t, given: (x, 1 - t, given),
    "text mask ignored": lambda x, t, given: (x, t, replace(given, text_mask=torch.ones_like(given.text_mask))),
    "first frames not clean": lambda x, t, given: (not_clean(x), t, given),
}
OUTPUT_FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "right but for one row": lambda v: v * 1.2 if len(v) == 1 else v,
    "right but for the most frames": lambda v: v.roll(1, dims=1) if v.shape[1] == 32 else v,
    "batch mates shine through": lambda v: v + 1e-3 * (v.mean(0, keepdim=True) - v),
    "not a number": lambda v: v * torch.nan,
    "height and width swapped": lambda v: v.flatten(3).unflatten(3, (v.shape[4], v.shape[3])).transpose(3, 4),
    "none": lambda v: v,
}


class Changed:
    """An engine whose inputs or velocity something changes."""

    def __init__(self, engine: Engine, fault: str) -> None:
        self.engine, self.fault = engine, fault

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        given = (latents, timestep, conditions)
        if self.fault in INPUT_FAULTS:
            return self.engine.denoise(*INPUT_FAULTS[self.fault](*given))
        return OUTPUT_FAULTS[self.fault](self.engine.denoise(*given))


# --- what is shown


@pytest.fixture(scope="module")
def report(exported: Exported) -> ParityReport:
    return check_parity(TorchEngine(exported.network), exported.engine, exported.inputs, subject=exported.file.sha256)


def test_the_engine_equals_the_network_in_every_call_along_every_trajectory_and_row_by_row(
    exported: Exported, report: ParityReport
) -> None:
    corners = exported.profile.corners()
    assert report.passed and report.metrics["parity_error_over_bound"] < 0.5
    assert [call.shape for call in report.calls] == list(corners)
    assert {call.shape.batch for call in report.calls} == {1, 2, 32}
    assert all(call.reference_seconds > 0 and call.candidate_seconds > 0 for call in report.calls)
    usual = exported.profile.opt.model_copy(update={"batch": 4})
    expected = [(usual, 6), *((shape, 4) for shape in corners if shape != exported.profile.opt)]
    assert [(one.shape, len(one.errors)) for one in report.trajectories] == expected
    assert all(0 < error < 2e-5 for one in report.trajectories for error in one.errors)
    assert report.rows[0].rows == 4 and report.rows[0].max_abs_error < 2e-5


def test_the_metrics_are_the_worst_of_every_kind(report: ParityReport) -> None:
    metrics = report.metrics
    assert metrics["parity_max_abs_error"] == max(call.max_abs_error for call in report.calls)
    assert metrics["parity_relative_error"] == max(call.relative_error for call in report.calls)
    assert metrics["parity_trajectory_error"] == max(one.errors[-1] for one in report.trajectories)
    assert metrics["parity_batch_error"] == report.rows[0].max_abs_error
    assert "parity_psnr_db" not in metrics  # no codec, no frames
    decoded = report.trajectories[0].model_copy(update={"psnr_db": 42.0})
    seen = report.model_copy(update={"trajectories": (decoded,)})
    assert seen.metrics["parity_psnr_db"] == 42.0 and seen.metrics["parity_error_over_bound"] == 60 / 42


def test_a_report_survives_its_json_also_with_what_is_no_number(report: ParityReport) -> None:
    assert ParityReport.model_validate_json(report.model_dump_json()) == report
    broken = report.calls[0].model_copy(update={"max_abs_error": math.nan})
    failed = report.model_copy(update={"calls": (broken,)})
    text = failed.model_dump_json()
    assert json.loads(text)["calls"][0]["max_abs_error"] == "NaN"
    again = ParityReport.model_validate_json(text)
    assert not again.passed and again.metrics["parity_error_over_bound"] == math.inf
    with pytest.raises(ParityFailed, match="no shape was compared"):
        report.model_copy(update={"calls": ()}).require_passed()


def test_bounds_grow_from_precision_to_precision() -> None:
    order = [BOUNDS[name] for name in ("fp32", "fp16", "bf16", "int8")]
    for finer, coarser in pairwise(order):
        assert finer.max_abs_error < coarser.max_abs_error and finer.relative_error < coarser.relative_error
        assert finer.trajectory_error < coarser.trajectory_error and finer.psnr_db > coarser.psnr_db


# --- on what


def test_rows_are_seeded_no_two_alike_and_like_those_of_sampling(exported: Exported) -> None:
    shape = Shape(batch=8, frames=8, height=8, width=8, text_tokens=12)
    latents, timestep, conditions = exported.inputs.call(shape, seed=0)
    assert torch.equal(latents, exported.inputs.call(shape, seed=0)[0])
    assert not torch.equal(latents, exported.inputs.call(shape, seed=1)[0])
    assert timestep[0] == 0 and timestep.max() > 0.8 and timestep.max() < 1
    assert len(set(timestep.tolist())) == 8
    lengths = conditions.text_mask.sum(1)
    assert lengths[0] == 12 and 1 <= lengths.min() < 12
    assert conditions.micro[0].tolist() == [32, 32, 0, 0, 1, 8]
    videos = exported.inputs.videos(shape, seed=0)
    assert len(videos.noise) == 4 and len(set(videos.guidance.scale.tolist())) == 4
    assert videos.image.frame_mask.sum(1).tolist() == [0, 1, 0, 1]


def test_real_inputs_are_encoded_clips_with_their_captions_and_the_picture_shows_them(tmp_path: Path) -> None:
    sampling = {"solver": "euler", "stochastic": False, "num_steps": 2}
    recipe = make_recipe(text={"max_tokens": 32}, export={"max_rows": 4}, sampling=sampling)
    text = load_text_encoder(recipe.text)
    network = make_network(recipe, text=text.hidden_size, pooled=text.pooled_size)
    frames = to_frames([clip.frames for clip in generate(12, num_frames=8, size=32, seed=3)])
    codec = PatchPca.fit(frames, 6, 4, power=0.25)
    profile = ShapeProfile.of(recipe, network, stretch=1)
    inputs = ParityInputs(profile, recipe, codec, text)
    for shape in (profile.min, profile.opt.model_copy(update={"batch": 4, "text_tokens": 32})):
        latents, _, conditions = inputs.call(shape, seed=0)
        assert latents.shape == profile.input_shapes(shape)["latents"]
        assert conditions.text.shape == profile.input_shapes(shape)["text"]
        assert conditions.text_mask[0].all() and conditions.text_mask.any(1).all()
    decoded = codec.decode(inputs.videos(shape, seed=0).image.latents)
    assert (decoded[0, 1:] - decoded[0, :-1]).abs().max() > 0.5, "something moves"

    engine = TorchEngine(network)
    picture = tmp_path / "parity.png"
    report = check_parity(engine, engine, inputs, subject="", picture=picture)
    assert report.metrics["parity_psnr_db"] == 200 and report.metrics["parity_trajectory_error"] == 0
    with Image.open(picture) as seen:
        assert seen.width > 600 and seen.height > 700  # the chart, and two strips of three rows
    failing = report.trajectories[0].model_copy(update={"psnr_db": 20.0})
    with pytest.raises(ParityFailed, match="PSNR of the video in dB is 20, fp32 allows 60"):
        report.model_copy(update={"trajectories": (failing,)}).require_passed()


# --- what is caught


FAULTS = sorted({*INPUT_FAULTS, *OUTPUT_FAULTS} - {"none", "batch mates shine through"})


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_with_a_fault_is_caught(exported: Exported, fault: str) -> None:
    engine = exported.engine
    shapes = [shape for shape in exported.profile.corners() if shape.batch <= 2]
    report = check_calls(engine, Changed(engine, fault), exported.inputs, shapes=shapes)
    with pytest.raises(ParityFailed, match="fp32 allows"):
        report.require_passed()
    coarse = check_calls(engine, Changed(engine, fault), exported.inputs, shapes=shapes, precision="bf16")
    assert not coarse.passed, "also where a low precision is allowed more"


def test_an_engine_whose_rows_depend_on_their_batch_mates_is_caught(exported: Exported) -> None:
    mixed = Changed(exported.engine, "batch mates shine through")
    assert compare_rows(mixed, exported.inputs, 0).max_abs_error > 5 * BOUNDS["fp32"].max_abs_error


@pytest.mark.parametrize(
    "name", ["blocks.2.temporal.query_norm.weight", "blocks.1.cross.key_value.bias", "patch_embedding.weight"]
)
def test_one_perturbed_value_of_one_weight_is_caught(exported: Exported, name: str) -> None:
    network = copy.deepcopy(exported.network)
    with torch.no_grad():
        network.get_parameter(name).view(-1)[0] += 0.05
    report = check_calls(TorchEngine(network), exported.engine, exported.inputs, shapes=[exported.profile.opt])
    with pytest.raises(ParityFailed, match=r"batch 2.*largest error is .*, fp32 allows 0\.0001"):
        report.require_passed()


def test_a_fault_too_small_for_one_call_shows_along_the_trajectory(exported: Exported) -> None:
    """Each call is within the bound of bf16; guidance widens what leans apart, and every step adds to it."""

    class Leaning:
        def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
            velocity = exported.engine.denoise(latents, timestep, conditions)
            lean = 0.9 * BOUNDS["bf16"].relative_error * velocity.square().mean().sqrt()
            conditional = torch.arange(len(velocity)) < len(velocity) / 2
            return velocity + torch.where(conditional, lean, -lean)[:, None, None, None, None]

    usual = exported.profile.opt
    assert check_calls(exported.engine, Leaning(), exported.inputs, shapes=[usual], precision="bf16").passed
    drawn, _ = compare_trajectories(
        exported.engine, Leaning(), exported.inputs, usual.model_copy(update={"batch": 4}), 0, num_steps=None
    )
    assert list(drawn.errors) == sorted(drawn.errors) and drawn.errors[-1] > BOUNDS["bf16"].trajectory_error
