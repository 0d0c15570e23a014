"""The loader: same samples for the same seed, whatever the ranks and however often it is resumed."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import DataConfig, Task, VideoConfig
from model.data.batch import ClipBatch
from model.data.clips import shape_samples
from model.data.loader import ClipLoader
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import Sample, ShardSet
from model.tasks import draw_task


def gradient(key: str, *, frames: int = 20, height: int = 40, width: int = 64, source: str = "film") -> Sample:
    """Pixels say where they are: red the row, green the column, blue the frame."""
    pixels = np.zeros((frames, height, width, 3), dtype=np.uint8)
    pixels[..., 0] += np.arange(height, dtype=np.uint8)[None, :, None]
    pixels[..., 1] += np.arange(width, dtype=np.uint8)[None, None, :]
    pixels[..., 2] += np.arange(frames, dtype=np.uint8)[:, None, None]
    return Sample(key, pixels, f"film {key}", source, "CC0", "nobody", 25.0, 10 * height, 10 * width)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=16) as writer:
        for sample in shape_samples(generate(48, num_frames=8, size=32, seed=0)):
            writer.write(sample)
        for index in range(6):
            writer.write(gradient(f"g{index}"))
        writer.write(gradient("short", frames=5))
    return ShardSet(folder)


def loader(
    shards: ShardSet,
    weights: dict[str, float] | None = None,
    *,
    num_frames: int = 8,
    size: tuple[int, int] = (32, 32),
    stride: int = 1,
    micro_batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> ClipLoader:
    return ClipLoader(
        shards,
        video=VideoConfig(num_frames=num_frames, height=size[0], width=size[1], frame_stride=stride),
        data=DataConfig(weights=weights or {"moving_shapes": 1.0}),
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        task="t2i" if num_frames == 1 else "t2v",
    )


def take(batches: Iterator[ClipBatch], count: int) -> ClipBatch:
    """The next `count` batches as one."""
    taken = list(islice(batches, count))
    return ClipBatch(
        clips=torch.cat([batch.clips for batch in taken]),
        captions=[caption for batch in taken for caption in batch.captions],
        micro=torch.cat([batch.micro for batch in taken]),
        keys=[key for batch in taken for key in batch.keys],
        numbers=[number for batch in taken for number in batch.numbers],
    )


def keys(batches: Iterator[ClipBatch], count: int) -> list[str]:
    return [key for batch in islice(batches, count) for key in batch.keys]


def assert_equal(one: ClipBatch, two: ClipBatch) -> None:
    assert one.keys == two.keys and one.captions == two.captions and one.numbers == two.numbers
    assert torch.equal(one.frames, two.frames) and torch.equal(one.micro, two.micro)


MIX = {"moving_shapes": 2.0, "film": 1.0}


def test_a_batch_has_the_shapes_and_ranges_of_the_contract(shards: ShardSet) -> None:
    batch = next(loader(shards, MIX))
    assert batch.frames.shape == (4, 8, 3, 32, 32) and batch.frames.dtype == torch.float32
    assert batch.frames.is_contiguous() and batch.frames.min() >= -1.0 and batch.frames.max() <= 1.0
    assert batch.micro.shape == (4, 6) and batch.micro.dtype == torch.float32
    assert len(batch.captions) == len(batch.keys) == 4


def test_a_clip_of_the_right_size_passes_untouched(shards: ShardSet) -> None:
    stored = {sample.key: sample for sample in map(shards.sample, range(48))}
    batch = take(loader(shards), 12)
    for frames, caption, micro, key in zip(batch.frames, batch.captions, batch.micro, batch.keys, strict=True):
        pixels = ((frames + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pixels, stored[key].frames) and caption == stored[key].caption
        assert micro.tolist() == [32, 32, 0, 0, 1, 8]


def test_one_epoch_shows_every_clip_once_and_the_next_in_another_order(shards: ShardSet) -> None:
    batches = loader(shards)
    first, second = take(batches, 12), take(batches, 12)
    assert len(set(first.keys)) == 48 and set(first.keys) == set(second.keys)
    assert first.keys != second.keys


def test_sources_come_as_often_as_their_weights_say(shards: ShardSet) -> None:
    seen = keys(loader(shards, {"moving_shapes": 3.0, "film": 1.0}, num_frames=1, micro_batch_size=55), 40)
    film = [key for key in seen if not key.startswith("moving")]
    assert len(film) / len(seen) == pytest.approx(0.25, abs=0.002)
    counts = Counter(film)
    assert len(counts) == 7 and max(counts.values()) - min(counts.values()) < 0.2 * len(film) / 7


def test_a_rare_source_comes_rarely_but_comes(shards: ShardSet) -> None:
    seen = keys(loader(shards, {"moving_shapes": 199.0, "film": 1.0}, num_frames=1, micro_batch_size=55), 100)
    assert sum(not key.startswith("moving") for key in seen) == pytest.approx(27.5, abs=9)


@pytest.mark.parametrize("drawn", [0, 1, 5, 17])
def test_a_resumed_loader_gives_exactly_the_same_batches(shards: ShardSet, drawn: int) -> None:
    straight = loader(shards, MIX)
    take(straight, drawn) if drawn else None
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = loader(shards, MIX)
    resumed.load_state_dict(state)
    assert_equal(take(straight, 20), take(resumed, 20))


def test_ranks_together_see_what_one_rank_sees(shards: ShardSet) -> None:
    alone = loader(shards, MIX, micro_batch_size=8)
    ranks = [loader(shards, MIX, micro_batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    for _ in range(15):
        parts = [next(rank) for rank in ranks]
        assert_equal(next(alone), take(iter(parts), 4))
    assert {json.dumps(rank.state_dict()) for rank in ranks} == {json.dumps(alone.state_dict())}


def test_a_run_resumes_on_another_number_of_ranks(shards: ShardSet) -> None:
    before = [loader(shards, MIX, micro_batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(7):
        for rank in before:
            next(rank)
    after = loader(shards, MIX, micro_batch_size=6)
    after.load_state_dict(before[1].state_dict())
    for _ in range(5):
        assert_equal(next(after), take(iter([next(rank) for rank in before]), 2))


def test_another_seed_gives_another_order(shards: ShardSet) -> None:
    assert take(loader(shards), 3).keys != take(loader(shards, seed=1), 3).keys


def test_a_window_keeps_stride_order_and_bounds(shards: ShardSet) -> None:
    batch = take(loader(shards, {"film": 1.0}, num_frames=4, size=(40, 64), stride=3), 50)
    at = ((batch.frames[:, :, 2, 0, 0] + 1) * 127.5).round().int()
    assert torch.equal(at[:, 1:] - at[:, :-1], torch.full((200, 3), 3))
    assert set(at[:, 0].tolist()) == set(range(11)), "every start from 0 to 20 - 10 is drawn"
    assert batch.micro[:, 4:].unique(dim=0).tolist() == [[3, 4]]


def test_crops_are_random_and_told_in_source_pixels(shards: ShardSet) -> None:
    batch = take(loader(shards, {"film": 1.0}, num_frames=2, size=(40, 40)), 50)
    left = ((batch.frames[:, 0, 1, 0, 0] + 1) * 127.5).round()
    assert torch.equal(batch.micro[:, 3], left * 10), "stored pixels are a tenth of the source's"
    assert batch.micro[:, :3].unique(dim=0).tolist() == [[400, 640, 0]]
    assert left.unique().numel() > 15 and left.max() <= 24


def test_a_resize_keeps_the_aspect_and_averages(shards: ShardSet) -> None:
    batch = next(loader(shards, {"film": 1.0}, num_frames=2, size=(20, 20)))
    pixels = (batch.frames + 1) * 127.5
    assert torch.allclose(pixels[:, 0, 0, :, 0], torch.arange(20.0) * 2 + 0.5, atol=0.51)
    across = pixels[:, 0, 1, 0, :]
    assert torch.allclose(across[:, 1:] - across[:, :-1], torch.tensor(2.0), atol=1.01)
    assert torch.allclose(across[:, 0], batch.micro[:, 3] / 10 + 0.5, atol=0.51)


def test_a_small_clip_is_enlarged_to_fill_the_frame(shards: ShardSet) -> None:
    batch = next(loader(shards, num_frames=2, size=(48, 64)))
    assert batch.frames.shape == (4, 2, 3, 48, 64)
    assert batch.micro[:, 3].tolist() == [0, 0, 0, 0] and batch.micro[:, 2].max() <= 8


def test_no_clip_is_mirrored(shards: ShardSet) -> None:
    batch = take(loader(shards, {"film": 1.0}, num_frames=1, size=(32, 32)), 25)
    assert (batch.frames[:, 0, 1, 0, -1] > batch.frames[:, 0, 1, 0, 0]).all()
    assert (batch.frames[:, 0, 0, -1, 0] > batch.frames[:, 0, 0, 0, 0]).all()


def test_an_image_stage_takes_any_frame_and_the_image_caption(shards: ShardSet) -> None:
    batch = take(loader(shards, MIX, num_frames=1), 40)
    assert batch.frames.shape == (160, 1, 3, 32, 32) and batch.micro[:, 5].unique().tolist() == [1]
    for key, caption in zip(batch.keys, batch.captions, strict=True):
        assert ("moves" not in caption) if key.startswith("moving") else (caption == f"film {key}")
    assert "short" in batch.keys
    blues = ((batch.frames[:, 0, 2, 0, 0] + 1) * 127.5).round()
    assert len({int(blue) for blue, key in zip(blues, batch.keys, strict=True) if key.startswith("g")}) > 10


def test_short_clips_are_left_out_and_counted(shards: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="model.data.order"):
        batches = loader(shards, {"film": 1.0}, num_frames=4, stride=3)
    assert caplog.messages == ["excluded 1 of 7 clips of film: under 10 frames"]
    assert "short" not in take(batches, 20).keys


def test_no_clip_long_enough_is_an_error_with_the_numbers(shards: ShardSet) -> None:
    with pytest.raises(
        ValueError, match="num_frames 8 at frame_stride 3 needs 22 frames, the longest of 7 clips has 20"
    ):
        loader(shards, MIX, stride=3)


def test_an_unknown_source_is_refused_with_the_known_ones(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"source 'flim'; .* holds \['film', 'moving_shapes'\]"):
        loader(shards, {"flim": 1.0})


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"position": 3},
        {"step": 1},
        {"step": -1, "drawn": [4]},
        {"step": 1, "drawn": ["4"]},
        {"step": 1, "drawn": [4, 4]},
        {"step": 1, "drawn": [4], "epoch": 2},
    ],
)
def test_a_state_of_another_kind_is_refused(shards: ShardSet, state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="loader state"):
        loader(shards).load_state_dict(state)


def mixed(shards: ShardSet, mix: dict[Task, float], *, temporal_patch_size: int = 1) -> ClipLoader:
    """Of the films, whose blue is the number of the frame."""
    return ClipLoader(
        shards,
        video=VideoConfig(num_frames=4, height=40, width=64, frame_stride=2, keyframe_stride=5),
        data=DataConfig(weights={"film": 1.0}),
        micro_batch_size=50,
        rank=0,
        world_size=1,
        seed=3,
        task="t2v",
        mix=mix,
        temporal_patch_size=temporal_patch_size,
    )


def frame_numbers(batch: ClipBatch) -> Tensor:
    """Place [B, T] of every frame in its film."""
    return ((batch.frames[:, :, 2, 0, 0] + 1) * 127.5).round().int()


def test_a_mix_cuts_every_clip_by_its_own_task_and_tells_its_stride(shards: ShardSet) -> None:
    mix: dict[Task, float] = {"keyframes": 1.0, "interpolation": 3.0}
    batch = take(mixed(shards, mix), 4)
    at = frame_numbers(batch)
    drawn = [draw_task(mix, 3, number) for number in range(200)]
    for row, task in enumerate(drawn):
        stride = 5 if task == "keyframes" else 2
        assert set((at[row, 1:] - at[row, :-1]).tolist()) == {stride}
        assert batch.micro[row, 4:].tolist() == [stride, 4]
    assert 0.15 < drawn.count("keyframes") / 200 < 0.35
    assert set(at[:, 0].tolist()) >= {0, 1, 4}, "a clip begins anywhere"


def test_a_mix_of_one_task_is_that_task(shards: ShardSet) -> None:
    assert_equal(take(mixed(shards, {}), 3), take(mixed(shards, {"t2v": 0.5}), 3))


def test_views_begin_at_the_input_view_which_fills_the_first_token(shards: ShardSet) -> None:
    for patch, wanted in ((1, [0, 1, 2, 3]), (2, [0, 0, 1, 2])):
        batch = take(mixed(shards, {"multiview": 1.0}, temporal_patch_size=patch), 1)
        assert frame_numbers(batch).unique(dim=0).tolist() == [wanted]
        assert batch.micro[:, 4:].unique(dim=0).tolist() == [[1, 4]]


def test_a_mix_wants_clips_that_are_long_enough_for_its_longest_task(shards: ShardSet) -> None:
    video = VideoConfig(num_frames=4, height=40, width=64, keyframe_stride=7)
    with pytest.raises(ValueError, match="num_frames 4 at keyframe_stride 7 needs 22 frames, the longest of 7"):
        ClipLoader(
            shards,
            video=video,
            data=DataConfig(weights={"film": 1.0}),
            micro_batch_size=1,
            rank=0,
            world_size=1,
            seed=0,
            task="t2v",
            mix={"t2v": 1.0, "keyframes": 1.0},
        )


def test_ranks_seeds_and_tasks_out_of_range_are_refused(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"rank 2 is not one of 2 ranks \(0 to 1\)"):
        loader(shards, rank=2, world_size=2)
    with pytest.raises(ValueError, match="seed -1"):
        loader(shards, seed=-1)
    with pytest.raises(ValueError, match="num_frames must be 1, not 8"):
        ClipLoader(
            shards,
            video=VideoConfig(num_frames=8, height=32, width=32),
            data=DataConfig(),
            micro_batch_size=1,
            rank=0,
            world_size=1,
            seed=0,
            task="t2i",
        )
