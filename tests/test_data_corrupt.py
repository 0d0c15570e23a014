"""A corrupt sample is an error, or counted and replaced up to a limit: by the same other one in every run."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest

from model.config import DataConfig, VideoConfig
from model.data.clips import shape_samples
from model.data.loader import ClipLoader
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import SampleCorrupt, ShardSet
from monitoring.metrics import TRAINING_CORRUPT_SAMPLES_TOTAL

COUNT = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path) as writer:
        for sample in shape_samples(generate(COUNT, num_frames=4, size=16, seed=0)):
            writer.write(sample)
    return tmp_path


def damage(folder: Path, places: Iterable[int]) -> ShardSet:
    """Flip a bit in the pixels of these samples."""
    entries, path = ShardSet(folder).entries, folder / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    for place in places:
        data[entries[place].offset + 500] ^= 1
    path.write_bytes(bytes(data))
    return ShardSet(folder)


def loader(shards: ShardSet, max_corrupt: int, *, rank: int = 0, world_size: int = 1) -> ClipLoader:
    return ClipLoader(
        shards,
        video=VideoConfig(num_frames=4, height=16, width=16),
        data=DataConfig(max_corrupt=max_corrupt),
        micro_batch_size=4 // world_size,
        rank=rank,
        world_size=world_size,
        seed=0,
        task="t2v",
    )


def counted() -> float:
    return next(iter(TRAINING_CORRUPT_SAMPLES_TOTAL.collect())).samples[0].value


def test_the_first_corrupt_sample_ends_a_run_that_allows_none(folder: Path) -> None:
    with pytest.raises(
        SampleCorrupt, match=r"sample 'moving_shapes-000003' is corrupt.*max_corrupt allows 0 and can be raised"
    ):
        list(islice(loader(damage(folder, [3]), 0), 3))


def test_a_corrupt_sample_is_counted_once_named_and_replaced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = [batch.keys for batch in islice(loader(ShardSet(folder), 0), 6)]
    before = counted()
    seen = [batch.keys for batch in islice(loader(damage(folder, [3, 4]), 2), 6)]
    stand_in = {"moving_shapes-000003": "moving_shapes-000005", "moving_shapes-000004": "moving_shapes-000005"}
    assert seen == [[stand_in.get(key, key) for key in keys] for keys in whole], "two epochs, all else as it was"
    assert counted() - before == 2
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2 and all("moving_shapes-00000" in line and "shard-00000.tar" in line for line in told)


def test_one_more_than_allowed_ends_the_run(folder: Path) -> None:
    with pytest.raises(SampleCorrupt, match=r"corrupt so far: 3, data\.max_corrupt allows 2"):
        list(islice(loader(damage(folder, [1, 5, 9]), 2), 3))


def test_every_number_of_ranks_and_every_resumption_sees_the_same_stand_ins(folder: Path) -> None:
    shards = damage(folder, [0, 6, 7])
    alone = [batch.keys for batch in islice(loader(shards, 3), 9)]
    ranks = [loader(shards, 3, rank=rank, world_size=2) for rank in range(2)]
    assert [[*next(ranks[0]).keys, *next(ranks[1]).keys] for _ in range(5)] == alone[:5]
    resumed = loader(shards, 3)
    resumed.load_state_dict(json.loads(json.dumps(ranks[1].state_dict())))
    assert [batch.keys for batch in islice(resumed, 4)] == alone[5:]


def test_a_set_with_nothing_readable_says_so(folder: Path) -> None:
    with pytest.raises(SampleCorrupt, match="no sample of source 'moving_shapes' can be read"):
        next(loader(damage(folder, range(COUNT)), COUNT))
