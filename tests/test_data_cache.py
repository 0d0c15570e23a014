"""Shards in a store: fetched when wanted, verified on arrival, kept up to a limit; the same clips as from a folder."""

import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from infra.store.artifacts import ArtifactCorrupt, ArtifactStore, blob_key
from infra.store.location import open_store
from model.config import DataConfig, VideoConfig
from model.data.cache import ShardCache
from model.data.clips import shape_samples
from model.data.loader import ClipLoader
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import INDEX, ShardSet


@pytest.fixture
def written(tmp_path: Path) -> ShardSet:
    """Six shards of four clips, all of one size."""
    with ShardWriter(tmp_path / "written", max_samples=4) as writer:
        for sample in shape_samples(generate(24, num_frames=4, size=16, seed=0)):
            writer.write(sample)
    return ShardSet(tmp_path / "written")


def stored(written: ShardSet, store: ArtifactStore) -> Path:
    """A folder with the index alone; the shards are in the store."""
    for shard in written.index.shards:
        store.put_file(written.folder / shard.name)
    bare = written.folder.parent / "bare"
    bare.mkdir()
    shutil.copy(written.folder / INDEX, bare)
    return bare


def held(cache: ShardCache) -> set[str]:
    return {path.stem for path in cache.folder.glob("*.tar")}


def test_a_set_in_a_store_gives_the_clips_of_the_folder(
    written: ShardSet, store: ArtifactStore, tmp_path: Path
) -> None:
    bare = stored(written, store)
    cache = ShardCache(lambda: store, tmp_path / "cache", max_bytes=10**9)
    shards = ShardSet(bare, cache)
    assert held(cache) == set(), "nothing is fetched before it is wanted"
    for position in range(24):
        assert np.array_equal(shards.sample(position).frames, written.sample(position).frames)
    shards.verify()
    assert held(cache) == {shard.sha256 for shard in written.index.shards}


def test_the_cache_stays_below_its_limit_and_keeps_what_was_used_last(written: ShardSet, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    bare, size = stored(written, store), written.index.shards[0].size
    cache = ShardCache(lambda: store, tmp_path / "cache", max_bytes=2 * size)
    digests = [shard.sha256 for shard in written.index.shards]
    with cache.open(digests[0], size) as opened:
        for wanted, left in ((1, {0, 1}), (0, {0, 1}), (2, {0, 2}), (3, {2, 3})):
            cache.open(digests[wanted], size).close()
            assert held(cache) == {digests[at] for at in left}
        found = opened.read()
    assert found == (written.folder / "shard-00000.tar").read_bytes(), "one given up is readable where it is open"
    shards = ShardSet(bare, cache)
    assert [shards.sample(position).key for position in range(24)] == [entry.key for entry in written.entries]


def test_a_shard_larger_than_the_cache_is_refused(written: ShardSet, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    shards = ShardSet(stored(written, store), ShardCache(lambda: store, tmp_path / "cache", max_bytes=1000))
    with pytest.raises(ValueError, match=r"a shard of .* bytes exceeds the cache's limit of 1000"):
        shards.sample(0)


def test_a_shard_that_is_corrupt_in_the_store_never_enters_the_cache(written: ShardSet, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    bare = stored(written, store)
    blob = tmp_path / "store" / blob_key(written.index.shards[0].sha256)
    data = bytearray(blob.read_bytes())
    data[3000] ^= 1
    blob.write_bytes(bytes(data))
    cache = ShardCache(lambda: store, tmp_path / "cache", max_bytes=10**9)
    with pytest.raises(ArtifactCorrupt):
        ShardSet(bare, cache).sample(0)
    assert held(cache) == set()


def test_a_set_without_its_shards_needs_a_cache(written: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the shard is missing from its set"):
        ShardSet(stored(written, open_store(str(tmp_path / "store"))))


def test_workers_read_through_the_cache_too(written: ShardSet, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    bare = stored(written, open_store(url))
    cache = ShardCache(partial(open_store, url), tmp_path / "cache", max_bytes=10**9)

    def keys(shards: ShardSet, workers: int) -> list[list[str]]:
        batches = ClipLoader(
            shards,
            video=VideoConfig(num_frames=4, height=16, width=16),
            data=DataConfig(),
            micro_batch_size=6,
            rank=0,
            world_size=1,
            seed=0,
            task="t2v",
            workers=workers,
        )
        try:
            return [batch.keys for batch in islice(batches, 4)]
        finally:
            batches.close()

    assert keys(ShardSet(bare, cache), 2) == keys(written, 0)
    assert len(held(cache)) == 6
