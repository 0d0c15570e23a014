"""Evaluation: what is drawn right measures right, real clips measure without a checker, and refs are measured."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from flows import cli
from infra.registry.registry import Registry
from infra.store.location import open_store
from model.checkpoint import folder as checkpoint
from model.conditioning import Conditions
from model.data.clips import SHAPES_SOURCE, shape_samples
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import Sample, ShardSet
from model.generation import ClipGenerator, to_frames
from model.measures.networks import OnnxNetwork
from model.measures.samples import SampleFigures
from model.network.stiv import STIV
from model.recipe import StageRecipe, dumps
from model.text import load_text_encoder
from model.training.evaluate import TIMES, evaluate
from model.vae import PatchPca
from tests.test_measures_networks import write_network
from tests.tiny_stage import stage

FRAMES = 8
Oracle = Callable[[Tensor], Tensor]
"""Clean latents [B, T, C, h, w] -> those that it draws."""


def recipe_of(task: str = "ti2v", *, frames: int = FRAMES, **sections: dict[str, Any]) -> StageRecipe:
    tree = stage(task).model_dump()
    tree["video"]["num_frames"] = frames
    tree["vae"]["latent_channels"] = 40
    tree["sampling"] |= {"num_steps": 2, "solver": "euler", "stochastic": False, "guidance": "none"}
    tree["evaluation"] = {"heldout_clips": 8, "sample_prompts": 12}
    for name, values in sections.items():
        tree[name] |= values
    return StageRecipe.model_validate(tree)


def write_set(folder: Path, samples: Sequence[Sample]) -> ShardSet:
    with ShardWriter(folder) as writer:
        for sample in samples:
            writer.write(sample)
    return ShardSet(folder)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Sixteen clips, each of another caption."""
    drawn = generate(16, num_frames=FRAMES, size=32, seed=5)
    return write_set(tmp_path_factory.mktemp("shapes") / "set", list(shape_samples(drawn)))


def oracle(recipe: StageRecipe, held: ShardSet, change: Oracle = lambda latents: latents) -> ClipGenerator:
    """Draws, for a caption, the held-out clip of that caption: the straight flow to it, exactly."""
    samples = [held.sample(place) for place in range(len(held))]
    clips = to_frames([sample.frames for sample in samples])
    codec = PatchPca.fit(clips, recipe.vae.latent_channels, recipe.vae.spatial_factor)
    text = load_text_encoder(recipe.text)
    pooled = Conditions.of(text.encode([sample.caption for sample in samples]), torch.zeros(len(samples), 6)).pooled
    latents = change(codec.encode(clips))

    def velocity(noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        meant = torch.cdist(conditions.pooled, pooled).argmin(dim=1)
        return (latents[meant] - noisy) / (1 - t).clamp_min(1e-6).reshape(-1, 1, 1, 1, 1)

    return ClipGenerator(velocity, codec, text, recipe)


def still(latents: Tensor) -> Tensor:
    return latents[:, :1].expand_as(latents)


def test_a_network_that_draws_what_the_captions_say_measures_right(shapes: ShardSet, tmp_path: Path) -> None:
    found = evaluate(oracle(recipe_of(), shapes), shapes, tmp_path).metrics
    for task in ("t2v", "ti2v"):
        for word in ("color", "shape", "direction", "joint"):
            assert found[f"{task}_{word}_accuracy"] == 1.0
        assert found[f"{task}_speed_error"] < 0.02
        assert found[f"{task}_dynamic_degree"] == 1.0
        assert found[f"{task}_mean_flow"] == pytest.approx(0.5 / 7, rel=0.2)
        assert found[f"{task}_frechet_pixel_motion_8x3"] < 0.1
    assert found["ti2v_first_frame_psnr_db"] > 30
    assert found["ti2v_psnr_db"] > 30
    assert found["ti2v_ssim"] > 0.9
    assert "t2v_psnr_db" not in found, "nothing was given, so nothing is to be near to"
    assert found["heldout_loss"] < 1e-6


def test_a_network_that_draws_no_motion_is_found_out(shapes: ShardSet, tmp_path: Path) -> None:
    found = evaluate(oracle(recipe_of(), shapes, still), shapes, tmp_path).metrics
    assert found["ti2v_color_accuracy"] == found["ti2v_shape_accuracy"] == 1.0
    assert found["ti2v_direction_accuracy"] == found["ti2v_joint_accuracy"] == 0.0
    assert found["ti2v_speed_error"] == 1.0
    assert found["ti2v_dynamic_degree"] == 0.0
    assert found["ti2v_first_frame_psnr_db"] > 30
    assert found["ti2v_psnr_db"] < 20
    assert found["ti2v_frechet_pixel_motion_8x3"] > 1


def test_the_heldout_loss_is_the_mean_of_its_times(shapes: ShardSet, tmp_path: Path) -> None:
    found = evaluate(oracle(recipe_of("t2v"), shapes, still), shapes, tmp_path).metrics
    times = [found[f"heldout_loss_t{index}"] for index in range(TIMES)]
    assert found["heldout_loss"] == pytest.approx(sum(times) / TIMES)
    # The oracle's error is (wrong - right) / (1 - t): it grows towards data.
    ratios = [(times[index] / times[0]) ** 0.5 for index in range(TIMES)]
    assert ratios == pytest.approx(
        [(1 - 0.5 / TIMES) / (1 - (index + 0.5) / TIMES) for index in range(TIMES)], rel=1e-3
    )


@pytest.mark.parametrize("task", ["prediction", "interpolation", "upsampling"])
def test_every_task_is_measured_on_the_frames_it_was_not_given(shapes: ShardSet, tmp_path: Path, task: str) -> None:
    tree = recipe_of("t2v", evaluation={"sample_prompts": 4}).model_dump()
    recipe = StageRecipe.model_validate({**tree, "task": task})
    found = evaluate(oracle(recipe, shapes), shapes, tmp_path / "right")
    right = found.metrics
    wrong = evaluate(oracle(recipe, shapes, lambda latents: latents.flip(1)), shapes, tmp_path / "wrong").metrics
    assert right[f"{task}_psnr_db"] > 30 and right[f"{task}_direction_accuracy"] == 1.0
    assert wrong[f"{task}_psnr_db"] < 25
    assert wrong[f"{task}_first_frame_psnr_db"] == right[f"{task}_first_frame_psnr_db"] > 30, "it was given"
    assert {path.name for path in (tmp_path / "right").iterdir()} == {"samples.json", "samples.png", f"{task}.webp"}
    by_sample = SampleFigures.loads(found.samples.read_bytes())
    means = {name: sum(each.values()) / len(each) for name, each in by_sample.figures.items()}
    assert means == {name: right[name] for name in means} and f"{task}_psnr_db" in means
    assert len(by_sample.figures["heldout_loss"]) == recipe.evaluation.heldout_clips
    assert by_sample.conditions["video"] == f"{recipe.video.num_frames}x{recipe.video.height}x{recipe.video.width}@8"


def test_an_image_stage_is_measured_without_motion(tmp_path: Path) -> None:
    samples = list(shape_samples(generate(16, num_frames=1, size=32, seed=5)))
    held = write_set(tmp_path / "set", samples)
    found = evaluate(oracle(recipe_of("t2i", frames=1), held), held, tmp_path / "out").metrics
    assert found["t2i_color_accuracy"] > 0.5
    for name in ("direction_accuracy", "joint_accuracy", "speed_error", "dynamic_degree", "psnr_db"):
        assert f"t2i_{name}" not in found


def film(index: int, *, frames: int = 20) -> Sample:
    """A textured picture that slides, larger than the recipe's and of another aspect."""
    rng = np.random.default_rng(index)
    picture = np.repeat(np.repeat(rng.integers(0, 256, (15, 40, 3), dtype=np.uint8), 4, 0), 4, 1)
    clip = np.stack([picture[:, 2 * at : 2 * at + 90] for at in range(frames)])
    return Sample(f"film-{index}", clip, f"film number {index}", "films", "CC0", "nobody", 24.0, 60, 90)


def test_real_clips_of_any_size_measure_without_a_checker(tmp_path: Path) -> None:
    recipe = recipe_of("t2v", data={"weights": {"films": 1.0}}, evaluation={"sample_prompts": 4})
    short = [film(index, frames=4) for index in range(100, 103)]
    held = write_set(tmp_path / "set", [*short, *(film(index) for index in range(6))])
    cut = write_set(
        tmp_path / "cut",
        [Sample(**{**fields(film(index)), "frames": film(index).frames[:FRAMES, 14:46, 29:61]}) for index in range(6)],
    )
    found = evaluate(oracle(recipe, cut), held, tmp_path / "out").metrics
    assert not [name for name in found if "accuracy" in name or "speed" in name]
    assert found["t2v_dynamic_degree"] == 1.0
    assert np.isfinite(found["t2v_frechet_pixel_motion_8x3"])
    with pytest.raises(ValueError, match=r"7 clips.*only 6 held-out clips of \['films'\] have 8 frames"):
        evaluate(oracle(recipe, cut), held, tmp_path / "out", count=7)


def fields(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in Sample.__slots__}


def test_given_networks_add_their_figures(shapes: ShardSet, tmp_path: Path) -> None:
    frame: dict[str, Any] = {"layout": "BCHW", "axes": (2, 3)}
    networks = [
        write_network(tmp_path, name="clip_mean", measure="fvd"),
        write_network(tmp_path, name="frame_mean", measure="fid", **frame),
        write_network(tmp_path, name="classes", measure="inception_score", splits=2),
        write_network(tmp_path, name="squares", measure="lpips", layout="BCHW", axes=(1, 2, 3), inputs=2),
    ]
    given = [OnnxNetwork(path) for path in networks]
    right = evaluate(oracle(recipe_of(), shapes), shapes, tmp_path / "right", networks=given).metrics
    wrong = evaluate(oracle(recipe_of(), shapes, still), shapes, tmp_path / "wrong", networks=given).metrics
    assert right["t2v_fvd_clip_mean"] == pytest.approx(0.0, abs=1e-4)
    assert right["t2v_fid_frame_mean"] == pytest.approx(0.0, abs=1e-4)
    assert 1.0 <= right["t2v_inception_score_classes"] < 3.0
    assert right["t2v_inception_score_sd_classes"] >= 0.0
    assert right["ti2v_lpips_squares"] < 0.1 * wrong["ti2v_lpips_squares"]
    assert "t2v_lpips_squares" not in right


# --- by ref, from the command line


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, shapes: ShardSet) -> Path:
    """A store with an untrained checkpoint at `ti2v/promoted`."""
    folder = tmp_path_factory.mktemp("published")
    recipe = recipe_of(evaluation={"heldout_clips": 4, "sample_prompts": 3}, sampling={"num_steps": 1})
    torch.manual_seed(0)
    network = STIV(recipe.network, latent_channels=recipe.vae.latent_channels, text_size=384, pooled_size=384)
    checkpoint.save_weights(folder / "checkpoint", network.state_dict(), recipe)
    PatchPca.fit(to_frames([shapes.sample(place).frames for place in range(8)]), recipe.vae.latent_channels, 8).save(
        folder / "codec"
    )
    registry = Registry(open_store(str(folder / "store")))
    held = {f"heldout/{path.name}": path for path in sorted(shapes.folder.iterdir())}
    dataset = registry.publish("dataset", held)
    codec = registry.publish("codec", {path.name: path for path in sorted((folder / "codec").iterdir())})
    trained = registry.publish(
        "checkpoint",
        {path.name: path for path in sorted((folder / "checkpoint").iterdir())},
        recipe=json.loads(dumps(recipe)),
        parents={"dataset": dataset.digest, "codec": codec.digest},
    )
    (folder / "digest").write_text(trained.digest)
    return folder


@pytest.fixture
def stiv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Path) -> Callable[..., str]:
    """Run a command on the checkpoint and return what it said; a refusal is what it said on stderr."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(
            "sys.argv", ["stiv", *(part.replace("REF", (store / "digest").read_text()) for part in arguments)]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return said.err if ended.value.code else said.out

    return run


def test_a_checkpoint_is_measured_by_ref_and_reported_with_all_it_depends_on(
    stiv: Callable[..., str], store: Path, tmp_path: Path
) -> None:
    network = write_network(tmp_path, name="clip_mean")
    said = stiv(
        *("evaluate", "REF", "--clips", "5", "--network", str(network)),
        *("--store", str(store / "store"), "--work", str(tmp_path / "work")),
    )
    assert "ti2v_fvd_clip_mean" in said
    digest = (store / "digest").read_text()
    folder = tmp_path / "work" / digest[:16]
    report = json.loads((folder / "evaluation.json").read_text())
    assert (report["checkpoint"], report["clips"]) == (digest, 5)
    assert report["networks"][0]["sha256"] == OnnxNetwork(network).sha256
    assert {"heldout_loss", "heldout_loss_t0", "ti2v_fvd_clip_mean", "t2v_joint_accuracy"} <= set(report["metrics"])
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json",
        "samples.json",
        "samples.png",
        "t2v.webp",
        "ti2v.webp",
    }


def test_what_cannot_be_measured_is_refused(stiv: Callable[..., str], store: Path, tmp_path: Path) -> None:
    place = ("--store", str(store / "store"), "--work", str(tmp_path / "work"))
    assert "99 clips" in stiv("evaluate", "REF", "--clips", "99", *place)
    assert "no CUDA GPU" in stiv("evaluate", "REF", "--device", "cuda", *place) or torch.cuda.is_available()


def pixels(video: Path) -> npt.NDArray[np.float64]:
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)])


def test_a_suite_is_drawn_in_vbenchs_layout_and_goes_on_where_it_was(
    stiv: Callable[..., str], store: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moves left\na blue square moves up\n")
    out = tmp_path / "videos"
    arguments = ("vbench", "videos", str(tmp_path / "prompts.txt"), str(out), "--ref", "REF")
    place = ("--store", str(store / "store"), "--work", str(tmp_path / "work"))
    assert "10 videos drawn" in stiv(*arguments, *place)
    names = {
        f"{prompt}-{index}.mp4"
        for prompt in ("a red circle moves left", "a blue square moves up")
        for index in range(5)
    }
    assert {path.name for path in out.iterdir()} == names
    assert set(json.loads((tmp_path / "videos.seeds.json").read_text())) == names
    one, other = (out / f"a red circle moves left-{index}.mp4" for index in (0, 1))
    before = pixels(one)
    assert before.shape == (FRAMES, 32, 32, 3)
    assert np.abs(before - pixels(other)).mean() > 10
    one.unlink()
    assert "1 videos drawn" in stiv(*arguments, *place)
    assert np.abs(pixels(one) - before).mean() < 1


def test_an_image_suite_starts_from_its_images(stiv: Callable[..., str], store: Path, tmp_path: Path) -> None:
    entry = {"prompt_en": "a green field", "dimension": ["i2v_subject"], "image_name": "field.jpg"}
    (tmp_path / "i2v.json").write_text(json.dumps([entry]))
    (tmp_path / "images").mkdir()
    arguments = ("vbench", "videos", str(tmp_path / "i2v.json"), str(tmp_path / "videos"), "--ref", "REF")
    place = ("--store", str(store / "store"), "--work", str(tmp_path / "work"))
    assert "has first frame field.jpg, images are in None" in stiv(*arguments, *place)
    images = ("--images", str(tmp_path / "images"))
    assert "field.jpg: no such image" in stiv(*arguments, *images, *place)
    Image.new("RGB", (80, 60), (30, 200, 40)).save(tmp_path / "images" / "field.jpg")
    assert "5 videos drawn" in stiv(*arguments, *images, *place)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    plain = ("vbench", "videos", str(tmp_path / "prompts.txt"), str(tmp_path / "more"), "--ref", "REF")
    assert "'a cat' has no first frame" in stiv(*plain, *images, *place)


def test_scores_are_added_up_from_official_results(stiv: Callable[..., str], tmp_path: Path) -> None:
    from tests.test_vbench import IMAGE, TEXT

    for name, dimensions in (("t2v", TEXT["M-512"][0]), ("i2v", IMAGE["STIV-M-512"][0])):
        results = {dimension: [value, []] for dimension, value in dimensions.items()}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    assert "81.20" in stiv("vbench", "scores", str(tmp_path / "t2v.json"))
    said = stiv("vbench", "scores", "--i2v", str(tmp_path / "i2v.json"))
    assert "90.06" in said and "86.57" in said
    assert "no score of" in stiv("vbench", "scores", str(tmp_path / "i2v.json"))


def test_the_source_of_moving_shapes_has_one_name() -> None:
    from model.training.evaluate import SHAPES

    assert SHAPES == SHAPES_SOURCE
