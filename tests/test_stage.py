"""A training step under the recipe's choices: what the network is given, what it learns, and that runs resume."""

import math
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.conditioning import first_frames
from model.config import TextConfig
from model.flow_matching import path
from model.recipe import StageRecipe
from model.training import parallel
from model.training.captions import CaptionTable
from model.training.prepare import prepare
from model.training.stage import StageTraining
from monitoring.goodput import Ledger
from tests.test_text import save_clip
from tests.tiny_stage import Inputs, stage, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def place(free_port: int) -> Iterator[parallel.Place]:
    """The only rank, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**own, "MASTER_PORT": str(free_port)}.items():
            patch.setenv(name, value)
        yield parallel.join(stage().training)
        parallel.leave()


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variant(task: str = "t2v", **sections: dict[str, Any]) -> StageRecipe:
    """A small stage with these fields of its sections changed."""
    tree = stage(task).model_dump()
    for section, fields in sections.items():
        tree[section].update(fields)
    return StageRecipe.model_validate({**tree, "parent": None})


ATTENDED: dict[str, Any] = {
    "network": {"image_cross_attention": "linear"},
    "conditioning": {"frame_replacement": False},
}
RECIPES: dict[str, StageRecipe] = {
    "plain": variant("ti2v"),
    "adamw": variant(optimizer={"type": "adamw"}),
    "diffusion": variant(flow={"objective": "diffusion", "timestep_distribution": "uniform"}),
    "cross_attention": variant("ti2v", **ATTENDED),
    "first_frame_loss": variant("ti2v", conditioning={"first_frame_loss": True}),
    "temporal_mask": variant(training={"temporal_mask_ratio": 0.5}),
    "bf16": variant(training={"precision": "bf16", "zero_stage": 2}),
    "buckets": variant(
        data={
            "buckets": [
                {"num_frames": 4, "height": 32, "width": 32},
                {"num_frames": 1, "height": 32, "width": 32},
                {"num_frames": 2, "height": 16, "width": 32},
            ]
        }
    ),
    "workers": variant(data={"workers": 1}),
    "recomputed": variant(training={"activation_checkpointing": True}),
    "zero_2": variant(training={"zero_stage": 2}),
}


def begin(recipe: StageRecipe, inputs: Inputs, run: Path, place: parallel.Place) -> StageTraining:
    return prepare(recipe, inputs.folders(run), place)


def train(training: StageTraining, steps: int) -> list[float]:
    return [training.train_step(2e-3, lambda: False, Ledger(None, "init")).loss for _ in range(steps)]


def whole(training: StageTraining) -> dict[str, Tensor]:
    masters = training.engine.masters
    parts = {"model": masters, "ema": training.ema.averages, "optimizer": training.optimizer.state_of(masters)}
    return {f"{part}:{piece.name}": piece.values.clone() for part, pieces in parts.items() for piece in pieces}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_resumes_ends_where_an_undisturbed_one_does_bit_for_bit(
    name: str, inputs: Inputs, place: parallel.Place, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    undisturbed = begin(recipe, inputs, tmp_path / "undisturbed", place)
    losses = train(undisturbed, 5)
    assert all(map(math.isfinite, losses))
    expected = whole(undisturbed)

    first = begin(recipe, inputs, tmp_path / "run", place)
    assert train(first, 3) == losses[:3]
    first.save()
    first.writer.close()
    resumed = begin(recipe, inputs, tmp_path / "run", place)
    assert resumed.step == 3 and train(resumed, 2) == losses[3:]
    found = whole(resumed)
    assert expected.keys() == found.keys()
    assert any(key.startswith("optimizer:") for key in found)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_weights_that_are_gathered_layer_by_layer_resume_within_rounding(
    inputs: Inputs, place: parallel.Place, tmp_path: Path
) -> None:
    """ZeRO 3's first step after a start gathers weights to other addresses, and matrix products round by address.

    AdamW divides a gradient by its own size, so the rounding of small ones shows: a hundredth of a step, at most.
    """
    recipe = variant(optimizer={"type": "adamw"}, training={"zero_stage": 3})
    undisturbed = begin(recipe, inputs, tmp_path / "undisturbed", place)
    train(undisturbed, 5)
    expected = whole(undisturbed)
    first = begin(recipe, inputs, tmp_path / "run", place)
    train(first, 3)
    first.save()
    first.writer.close()
    resumed = begin(recipe, inputs, tmp_path / "run", place)
    train(resumed, 2)
    found = whole(resumed)
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=2e-3 / 100, msg=key)


def test_a_run_that_starts_again_needs_its_text_encoder_for_new_captions_only(
    place: parallel.Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, file = tmp_path / "clip", tmp_path / "run" / "captions.safetensors"
    save_clip(encoder)
    text = TextConfig(type="clip", path=str(encoder), max_tokens=16)
    made = CaptionTable.kept(file, ["a red circle", "a blue square"], text, place)
    assert made.embeddings.tokens.shape[0] == 3, "the null text too"
    shutil.rmtree(encoder)

    again = CaptionTable.kept(file, ["a blue square", "a red circle"], text, place)
    assert again.places == made.places
    for part in ("tokens", "mask", "pooled"):
        assert torch.equal(getattr(again.embeddings, part), getattr(made.embeddings, part))
    with pytest.raises(ValueError, match="clip is not a folder"):
        CaptionTable.kept(file, ["a green star"], text, place)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="clip is not a folder"):
        CaptionTable.kept(file, ["a blue square", "a red circle"], text, place)
    assert "its captions are encoded again" in caplog.text


def seen(training: StageTraining) -> tuple[dict[str, Any], Tensor]:
    """What the network is called with in one step, and the gradient of the loss at its head."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    heads: list[Tensor] = []
    network = training.engine.network

    def note_call(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    def note_output(_: object, __: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: heads.append(gradient.detach()))

    hooks = [network.register_forward_pre_hook(note_call, with_kwargs=True), network.register_forward_hook(note_output)]
    train(training, 1)
    for hook in hooks:
        hook.remove()
    names = ("latents", "timestep", "text", "text_mask", "pooled", "micro")
    args, kwargs = calls[0]
    return {**dict(zip(names, args, strict=True)), **kwargs}, heads[0]


def clean(training: StageTraining) -> Tensor:
    """Latents of the first micro-batch."""
    return training.codec.encode(next(training.loader).frames)


def test_an_image_by_cross_attention_stands_beside_noisy_frames(
    inputs: Inputs, place: parallel.Place, tmp_path: Path
) -> None:
    recipe = RECIPES["cross_attention"]
    latents = clean(begin(recipe, inputs, tmp_path / "a", place))
    given, gradient = seen(begin(recipe, inputs, tmp_path / "b", place))
    told = given["image_given"]
    assert told.any()
    assert torch.equal(given["image"][told], latents[told, 0])
    assert not torch.isclose(given["latents"][:, 0], latents[:, 0]).all(dim=(1, 2, 3)).any()
    assert (gradient[told, 0] == 0).all()
    assert (gradient[told, 1] != 0).any()


def test_frame_replacement_gives_the_clean_frame_and_no_image(
    inputs: Inputs, place: parallel.Place, tmp_path: Path
) -> None:
    recipe = RECIPES["plain"]
    latents = clean(begin(recipe, inputs, tmp_path / "a", place))
    given, gradient = seen(begin(recipe, inputs, tmp_path / "b", place))
    replaced = (given["latents"] == latents).flatten(2).all(dim=2)
    assert replaced.any() and torch.equal(replaced, first_frames(4, 4) & replaced[:, :1])
    assert (gradient[replaced] == 0).all()
    assert given["image"] is None and given["image_given"] is None and given["keep_frames"] is None


def test_first_frame_loss_counts_the_given_frame(inputs: Inputs, place: parallel.Place, tmp_path: Path) -> None:
    recipe = RECIPES["first_frame_loss"]
    latents = clean(begin(recipe, inputs, tmp_path / "a", place))
    given, gradient = seen(begin(recipe, inputs, tmp_path / "b", place))
    replaced = (given["latents"] == latents).flatten(2).all(dim=2)
    assert replaced.any() and (gradient[replaced] != 0).any()


def test_token_frames_are_masked_in_the_first_phase_only(inputs: Inputs, place: parallel.Place, tmp_path: Path) -> None:
    training = begin(RECIPES["temporal_mask"], inputs, tmp_path, place)
    given, gradient = seen(training)
    assert given["keep_frames"].shape == (4, 1) and given["keep"].shape == (4, 2)
    learnt = (gradient != 0).any(dim=2).any(dim=3).any(dim=2)  # [B, T]
    assert torch.equal(learnt[:, ::2].long().argmax(dim=1, keepdim=True), given["keep_frames"])
    assert (learnt.sum(dim=1) == 2).all()
    training.step = training.recipe.training.steps
    given, _ = seen(training)
    assert given["keep_frames"] is None and given["keep"] is None


def test_diffusion_trains_on_its_own_path(inputs: Inputs, place: parallel.Place, tmp_path: Path) -> None:
    recipe = RECIPES["diffusion"]
    plain = variant(flow={"timestep_distribution": "uniform"})
    data = clean(begin(recipe, inputs, tmp_path / "a", place))
    diffused, _ = seen(begin(recipe, inputs, tmp_path / "b", place))
    flowed, _ = seen(begin(plain, inputs, tmp_path / "c", place))
    t = flowed["timestep"]
    rate = t.reshape(-1, 1, 1, 1, 1)
    noise = (flowed["latents"] - rate * data) / (1 - rate)
    assert torch.equal(diffused["timestep"], t)
    torch.testing.assert_close(diffused["latents"], path(recipe.flow, data, noise, t)[0], atol=1e-4, rtol=1e-4)
