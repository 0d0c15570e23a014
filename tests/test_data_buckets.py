"""Shape buckets: one shape a step within the tokens of a micro-batch, the same clips on any number of ranks."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.config import BucketConfig, DataConfig, VideoConfig
from model.data.batch import ClipBatch
from model.data.clips import shape_samples
from model.data.loader import ClipLoader
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import ShardSet
from model.recipe import StageRecipe
from model.training.draws import draw
from tests.tiny_stage import stage

VIDEO = VideoConfig(num_frames=4, height=16, width=16)
OWN = BucketConfig(num_frames=4, height=16, width=16)
IMAGE = BucketConfig(num_frames=1, height=16, width=16)
WIDE = BucketConfig(num_frames=2, height=16, width=32, weight=2.0)
LARGE = BucketConfig(num_frames=4, height=32, width=32)
TURNS = 12
"""Micro-batches of a step: as many on 1, 2, 3 and 4 ranks."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=8) as writer:
        for sample in shape_samples(generate(40, num_frames=4, size=16, seed=0)):
            writer.write(sample)
    return ShardSet(folder)


def loader(
    shards: ShardSet,
    *buckets: BucketConfig,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    micro_batch_size: int = 1,
    accumulation: int = 1,
    shuffle_shards: int = 0,
    temporal_patch_size: int = 1,
) -> ClipLoader:
    return ClipLoader(
        shards,
        video=VIDEO,
        data=DataConfig(shuffle_shards=shuffle_shards),
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        task="t2v",
        temporal_patch_size=temporal_patch_size,
        buckets=buckets,
        accumulation=accumulation,
    )


def clips(batches: list[ClipBatch]) -> dict[int, tuple[str, str, bytes]]:
    """Shape, key and pixels of each clip by its number; a number that comes twice is an error."""
    found: dict[int, tuple[str, str, bytes]] = {}
    for batch in batches:
        for number, key, pixels in zip(batch.numbers, batch.keys, batch.clips, strict=True):
            assert number not in found, f"clip {number} came twice"
            found[number] = (str(batch.bucket), key, pixels.numpy().tobytes())
    return found


@pytest.mark.parametrize(
    ("bucket", "shape"),
    [(OWN, (4, 4, 16, 16, 3)), (IMAGE, (16, 1, 16, 16, 3)), (WIDE, (4, 2, 16, 32, 3)), (LARGE, (1, 4, 32, 32, 3))],
)
def test_a_micro_batch_holds_what_its_tokens_allow(
    shards: ShardSet, bucket: BucketConfig, shape: tuple[int, ...]
) -> None:
    batch = next(loader(shards, bucket, micro_batch_size=4))
    assert tuple(batch.clips.shape) == shape and batch.bucket == bucket
    assert batch.clips.numel() <= 4 * 4 * 16 * 16 * 3


def test_a_shape_that_does_not_divide_the_tokens_stays_below_them(shards: ShardSet) -> None:
    batch = next(loader(shards, BucketConfig(num_frames=3, height=16, width=16), micro_batch_size=2))
    assert len(batch.keys) == 2, "8 frames of tokens hold two clips of 3"


def test_a_bucket_above_the_tokens_is_refused(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="one clip of bucket 4x32x32 has more tokens than a micro-batch of 3 clips"):
        loader(shards, LARGE, micro_batch_size=3)


def test_every_micro_batch_of_a_step_and_every_rank_has_the_same_shape(shards: ShardSet) -> None:
    ranks = [loader(shards, OWN, IMAGE, WIDE, rank=rank, world_size=3, accumulation=2) for rank in range(3)]
    seen: set[str] = set()
    for _ in range(30):
        step = [next(one) for one in ranks for _ in range(2)]
        assert len({str(batch.bucket) for batch in step}) == 1 and len({len(batch.keys) for batch in step}) == 1
        seen.add(str(step[0].bucket))
    assert seen == {"4x16x16", "1x16x16", "2x16x32"}


def test_steps_are_shared_out_by_weight(shards: ShardSet) -> None:
    drawn = Counter(str(batch.bucket) for batch in islice(loader(shards, OWN, IMAGE, WIDE), 600))
    assert drawn["2x16x32"] == pytest.approx(300, abs=45) and drawn["4x16x16"] == pytest.approx(150, abs=40)


def test_an_image_carries_a_stills_caption_and_fills_a_token(shards: ShardSet) -> None:
    batch = next(loader(shards, IMAGE, micro_batch_size=2, temporal_patch_size=2))
    assert tuple(batch.frames.shape) == (4, 2, 3, 16, 16), "two frames a token, so four images in the tokens of 2 x 4"
    assert torch.equal(batch.clips[:, 0], batch.clips[:, 1])
    assert batch.micro[:, 5].tolist() == [1.0] * 4
    assert not [caption for caption in batch.captions if "moves" in caption]


def test_each_shape_shows_every_clip_once_an_epoch(shards: ShardSet) -> None:
    batches = list(islice(loader(shards, OWN, WIDE, micro_batch_size=2), 200))
    for bucket in (OWN, WIDE):
        keys = [key for batch in batches if batch.bucket == bucket for key in batch.keys]
        assert len(keys) > 80 and len(set(keys[:40])) == len(set(keys[40:80])) == 40
        assert keys[:40] != keys[40:80]


def test_the_stages_own_shape_as_the_only_bucket_draws_as_often(shards: ShardSet) -> None:
    one = clips(list(islice(loader(shards, OWN), 40)))
    assert len({key for _, key, _ in one.values()}) == 40


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    buckets=st.lists(st.sampled_from([OWN, IMAGE, WIDE]), max_size=3),
    shuffle_shards=st.integers(0, 3),
    runs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 3)), min_size=1, max_size=4),
)
def test_no_clip_is_left_out_or_repeated_wherever_a_run_resumes(
    shards: ShardSet, seed: int, buckets: list[BucketConfig], shuffle_shards: int, runs: list[tuple[int, int]]
) -> None:
    """`runs` are (ranks, steps) one after the other, each resumed from the last; alone is one rank without a stop."""
    state: dict[str, object] | None = None
    batches: list[ClipBatch] = []
    for world_size, steps in runs:
        per_rank = TURNS // world_size
        ranks = [
            loader(
                shards,
                *buckets,
                rank=rank,
                world_size=world_size,
                seed=seed,
                accumulation=per_rank,
                shuffle_shards=shuffle_shards,
            )
            for rank in range(world_size)
        ]
        for one in ranks:
            if state is not None:
                one.load_state_dict(state)
            batches += islice(one, steps * per_rank)
        states = [one.state_dict() for one in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
    alone = loader(shards, *buckets, seed=seed, accumulation=TURNS, shuffle_shards=shuffle_shards)
    wanted = clips(list(islice(alone, TURNS * sum(steps for _, steps in runs))))
    assert clips(batches) == wanted and sorted(wanted) == list(range(len(wanted)))
    assert alone.state_dict() == state


def test_within_a_step_there_is_nothing_to_save(shards: ShardSet) -> None:
    batches = loader(shards, OWN, accumulation=2)
    next(batches)
    with pytest.raises(ValueError, match="1 of 2 micro-batches of a step are drawn: save between steps"):
        batches.state_dict()


def test_a_window_of_shards_is_mixed_at_a_time(shards: ShardSet) -> None:
    shard_of = {entry.key: entry.shard for entry in shards.entries}
    keys = [batch.keys[0] for batch in islice(loader(shards, shuffle_shards=2), 80)]
    for epoch in (keys[:40], keys[40:]):
        assert len(set(epoch)) == 40
        windows = [{shard_of[key] for key in epoch[at : at + 16]} for at in (0, 16, 32)]
        assert [len(window) for window in windows] == [2, 2, 1]
    everywhere = [batch.keys[0] for batch in islice(loader(shards), 16)]
    assert len({shard_of[key] for key in everywhere}) > 2


def bucketed(*buckets: dict[str, object], **changes: object) -> StageRecipe:
    plain = stage("t2v", **changes).model_dump()
    return StageRecipe.model_validate({**plain, "data": {**plain["data"], "buckets": list(buckets)}})


def shape(num_frames: int, height: int, width: int) -> dict[str, object]:
    return {"num_frames": num_frames, "height": height, "width": width}


@pytest.mark.parametrize(
    ("bucket", "reason"),
    [
        (shape(4, 40, 32), r"0 \(4x40x32\): video.height 40 is not a multiple of vae.spatial_factor 8 x"),
        (shape(3, 32, 32), r"0 \(3x32x32\): video.num_frames 3 is not a multiple of network.temporal_patch_size 2"),
        (
            shape(8, 64, 96),
            r"0 \(8x64x96\): one clip has 96 tokens, a micro-batch holds 32 \(training.micro_batch_size 4",
        ),
        (shape(0, 32, 32), "greater than or equal to 1"),
    ],
)
def test_a_bucket_that_the_network_cannot_take_is_refused_with_the_recipe(
    bucket: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        bucketed(bucket)


def test_a_bucket_must_suit_the_ranks_that_share_a_clip() -> None:
    with pytest.raises(ValidationError, match=r"data.buckets.0 \(1x32x32\): training.sequence_parallel 2 does not"):
        bucketed(shape(1, 32, 32), sequence_parallel=2, world_size=2)


def test_a_bucket_must_suit_a_learned_table() -> None:
    plain = stage("t2v").model_dump()
    network = {**plain["network"], "positions": "learned", "learned_grid": [2, 2, 2]}
    data = {**plain["data"], "buckets": [shape(2, 48, 32)]}
    with pytest.raises(ValidationError, match=r"data.buckets.0 .*learned_grid \(2, 2, 2\) is smaller"):
        StageRecipe.model_validate({**plain, "network": network, "data": data})


def test_an_image_stage_takes_no_video() -> None:
    plain = stage("t2i").model_dump()
    with pytest.raises(ValidationError, match="task 't2i' trains on images, num_frames must be 1"):
        StageRecipe.model_validate({**plain, "data": {**plain["data"], "buckets": [shape(2, 32, 32)]}})


def test_what_is_drawn_for_a_bucket_fits_its_batches(tmp_path: Path) -> None:
    recipe = bucketed(shape(1, 32, 32), shape(2, 32, 64), shape(4, 32, 32))
    for bucket, frames in zip(recipe.data.buckets, (2, 2, 4), strict=True):
        shaped = recipe.in_shape(bucket)
        drawn = draw(shaped, range(3), torch.Size((frames, 4, bucket.height // 8, bucket.width // 8)), mask_ratio=0.5)
        assert shaped.video.num_frames == frames == drawn.frame_mask.shape[1]
        assert list(shaped.tasks) == ["t2i" if bucket.num_frames == 1 else "t2v"]
    assert recipe.in_shape(recipe.data.buckets[2]).video == recipe.video
    assert np.isfinite(recipe.data.buckets[0].weight)
