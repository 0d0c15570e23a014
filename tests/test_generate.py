"""`stiv generate`: every task from the command line, by a network that was really trained on a mix of them."""

import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flows import cli
from infra.engines.export import require_served
from infra.ingest import ingest
from infra.launch.stage import StageOutcome, run_stage
from infra.registry.registry import Registry
from infra.serving import media
from infra.store.location import open_store
from model.config import ConditioningConfig, CorpusConfig
from model.data.moving_shapes import generate
from model.data.scenes import read_frames
from model.recipe import Curriculum, StageRecipe
from tests.tiny_stage import stage

FRAMES = 8
MIX = {"t2v": 1, "ti2v": 1, "prediction": 1, "interpolation": 1, "upsampling": 1, "multiview": 1, "keyframes": 1}
CLIP = next(iter(generate(1, num_frames=12, size=48, seed=4))).frames

pytestmark = pytest.mark.timeout(600)
Stiv = Callable[..., tuple[int, str, str]]


def recipe() -> StageRecipe:
    made = stage(steps=3, unmasked_steps=1, checkpoint_every=4).model_dump(mode="json")
    made |= {"name": "prediction", "task": "prediction"}
    made["video"] |= {"num_frames": FRAMES, "keyframe_stride": 1}
    made["conditioning"] |= {"mix": MIX}
    made["sampling"] |= {"num_steps": 2, "solver": "euler"}
    made["evaluation"] |= {"heldout_clips": 4, "sample_prompts": 2}
    made["gate"] = [{"metric": "heldout_loss", "op": "<", "bound": 100}]
    return StageRecipe.model_validate(made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, StageOutcome]:
    """A store that holds a promoted checkpoint of the mix."""
    folder = tmp_path_factory.mktemp("trained")
    store, made = str(folder / "store"), recipe()
    registry = Registry(open_store(store))
    gate = recipe().gate[0].model_copy(update={"metric": "train_samples", "op": ">=", "bound": 1})
    corpus = CorpusConfig(shapes=16, heldout_shapes=8, num_frames=FRAMES, gate=(gate,))
    ingest(
        registry, Curriculum(name="tasks", corpus=corpus, stages=(made,)), folder / "ingest", videos=None, who="tests"
    )
    return store, run_stage(made, registry, folder / "work", who="tests", on_progress=lambda _: None)


@pytest.fixture
def stiv(
    trained: tuple[str, StageOutcome],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Stiv:
    """Run `stiv generate` in a folder with a clip and a picture; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    media.write_mp4(tmp_path / "clip.mp4", CLIP, 8)
    for name, frame in (("first.png", CLIP[0]), ("last.png", CLIP[-1])):
        Image.fromarray(frame).save(tmp_path / name)

    def run(*arguments: str) -> tuple[int, str, str]:
        ref = [] if "--ref" in arguments else ["--ref", "prediction/promoted"]
        monkeypatch.setattr(sys, "argv", ["stiv", "generate", *arguments, *ref, "--store", trained[0]])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])])


def nearest(frame: np.ndarray) -> int:
    """Which frame of CLIP a frame of a film shows; codec and H.264 leave it blurred."""
    own = [np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.BOX)).astype(int) for one in CLIP]
    return int(np.argmin([np.abs(one - frame).mean() for one in own]))


def test_a_stage_trained_on_a_mix_is_measured_on_every_task_of_it(trained: tuple[str, StageOutcome]) -> None:
    _, outcome = trained
    assert set(outcome.animations) == set(MIX)
    for task in MIX:
        assert f"{task}_joint_accuracy" in outcome.checkpoint.metrics


@pytest.mark.parametrize(
    ("arguments", "length", "given"),
    [
        (["a red ball moves to the left"], FRAMES, {}),
        (["--task", "t2v"], FRAMES, {}),
        (["a red ball", "--frames", "first.png"], FRAMES, {0: 0}),
        (
            ["a ball", "--task", "prediction", "--frames", "clip.mp4", "--take", "2:6"],
            FRAMES,
            {0: 2, 1: 3, 2: 4, 3: 5},
        ),
        (["a ball", "--task", "interpolation", "--frames", "first.png", "--frames", "last.png"], FRAMES, {0: 0, 7: 11}),
        (["a ball", "--task", "upsampling", "--frames", "clip.mp4"], 24, {0: 0, 6: 3, 22: 11}),
        (["--task", "multiview", "--frames", "first.png"], 7, {0: 0}),
        (["a ball", "--task", "keyframes"], FRAMES, {}),
        (["a ball", "--task", "long_video", "--frames", "first.png"], 56, {0: 0}),
    ],
)
def test_every_task_writes_a_video_with_the_given_frames_in_it(
    stiv: Stiv, tmp_path: Path, arguments: list[str], length: int, given: dict[int, int]
) -> None:
    code, said, err = stiv(*arguments, "--out", "films/film.mp4")
    assert code == 0, err
    assert f"films/film.mp4: {length} frames of 32x32" in said and "denoise steps" in said
    film = read(tmp_path / "films" / "film.mp4")
    assert film.shape == (length, 32, 32, 3)
    assert {at: nearest(film[at]) for at in given} == given


def test_seed_and_sampling_decide_the_video(stiv: Stiv, tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"]), ("d", ["--set", "sampling.num_steps=3"])):
        assert stiv("a red ball", "--out", f"{name}.mp4", *more)[0] == 0
    a, b, c, d = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abcd")
    assert a == b and a != c and a != d


@pytest.mark.parametrize("size", [(32, 32), (16, 32), (32, 16)])
def test_given_video_frames_cover_the_size_and_are_cropped_at_the_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.zeros((3, 48, 96, 3), np.uint8)
    pixels[:, :, 24:72, 0] = 255  # the middle half is red
    media.write_mp4(tmp_path / "wide.mp4", pixels, 8)
    height, width = size
    frames = list(read_frames(tmp_path / "wide.mp4", height=height, width=width))
    assert [frame.shape for frame in frames] == [(height, width, 3)] * 3
    red = (frames[0][height // 2, :, 0] > 128).sum()
    assert red == pytest.approx({(32, 32): 32, (16, 32): 16, (32, 16): 16}[size], abs=2)


def test_a_server_takes_what_was_trained_for_text_or_a_first_frame() -> None:
    require_served(recipe())
    alone = recipe().model_copy(update={"conditioning": ConditioningConfig(mix={"interpolation": 1.0})})
    with pytest.raises(ValueError, match=r"trained for \['interpolation'\].*stiv generate"):
        require_served(alone)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "v2v"], ["unknown task 'v2v'", "interpolation"]),
        (["--task", "ti2v"], ["task 'ti2v'", "takes 1 given frames, not 0"]),
        (["--task", "prediction", "--frames", "clip.mp4"], ["takes 4 given frames, not 12", "8 frames"]),
        (["--task", "upsampling", "--frames", "first.png"], ["at least 4", "not 1"]),
        (["a ball", "--task", "multiview", "--frames", "first.png"], ["'multiview' takes no prompt", "'a ball'"]),
        (["--frames", "missing.png"], ["missing.png"]),
        (["--frames", "missing.mp4"], ["missing.mp4", "no such file"]),
        (["--frames", "notes.txt"], ["notes.txt", "neither an image nor a video", ".png"]),
        (["--frames", "broken.png"], ["broken.png", "not a readable image"]),
        (["--frames", "clip.mp4", "--take", "4"], ["--take '4'", "START:STOP"]),
        (["--set", "network.depth=2"], ["network.depth=2", "sampling.key=value"]),
        (["--set", "sampling.num_stps=2"], ["sampling.num_stps", "num_steps"]),
        (["--set", "sampling.num_steps=two"], ["'two' is not a TOML value"]),
        (["--set", "sampling.num_steps=0"], ["sampling.num_steps", "greater than or equal to 1"]),
        (["word " * 90], ["the prompt has", "at most 77"]),
        (["--out", "film.gif"], ["film.gif", ".mp4"]),
        (["--out", "film.png"], ["8 frames do not fit into one picture"]),
        (["--device", "cuda:99"], ["cuda:99"]),
    ],
)
def test_a_wish_that_cannot_be_is_one_line_that_says_why_and_writes_nothing(
    stiv: Stiv, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    code, _, err = stiv(*arguments)
    assert code == 1
    assert err.startswith("stiv: ") and err.count("\n") == 1, err
    for words in said:
        assert words in err
    assert not (tmp_path / "out.mp4").exists()


def test_only_a_checkpoint_draws(stiv: Stiv) -> None:
    code, _, err = stiv("a ball", "--ref", "codec/promoted")
    assert code == 1 and "'codec/promoted' is of kind 'codec'" in err
