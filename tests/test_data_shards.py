"""Shard sets: written whole or not at all, read back equal, corrupt bytes named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.tariterators import (  # pyright: ignore[reportMissingTypeStubs]
    group_by_keys,  # pyright: ignore[reportUnknownVariableType]
    tar_file_expander,  # pyright: ignore[reportUnknownVariableType]
)

from model.data.clips import shape_samples
from model.data.encoding import Encoding
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import Sample, SampleCorrupt, ShardCorrupt, ShardSet


def samples(count: int = 5) -> list[Sample]:
    return list(shape_samples(generate(count, num_frames=4, size=24, seed=0)))


def noise(key: str, *, frames: int = 3, source: str = "noise") -> Sample:
    pixels = np.random.default_rng(frames).integers(0, 256, size=(frames, 10, 14, 3), dtype=np.uint8)
    return Sample(key, pixels, "näher dran", source, "CC0", "nobody", 25.0, 100, 140)


def write(folder: Path, clips: list[Sample], max_samples: int = 2) -> Path:
    with ShardWriter(folder, max_samples) as writer:
        for sample in clips:
            writer.write(sample)
    return folder


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def drop_checksums(folder: Path) -> None:
    """Make the index one of version 1, as sets were written before samples had checksums."""
    index = json.loads((folder / "index.json").read_text())
    for entry in index["samples"]:
        for name in ("encoding", "size", "crc32", "image_caption"):
            del entry[name]
    (folder / "index.json").write_text(json.dumps({**index, "schema_version": 1}))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = [*samples(), noise("long_name-with_marks", frames=7)]
    shards = ShardSet(write(tmp_path, written))
    shards.verify()
    assert len(shards) == 6 and [entry.key for entry in shards.entries] == [sample.key for sample in written]
    for position, wanted in enumerate(written):
        read = shards.sample(position)
        assert np.array_equal(read.frames, wanted.frames) and not read.frames.flags.writeable
        for name in ("key", "caption", "source", "licence", "credit", "fps", "original_height", "original_width"):
            assert getattr(read, name) == getattr(wanted, name)
        assert dict(read.extra) == dict(wanted.extra)


def test_the_index_counts_shards_and_sources(tmp_path: Path) -> None:
    shards = ShardSet(write(tmp_path, [*samples(), noise("n", frames=7)]))
    assert [(shard.name, shard.samples) for shard in shards.index.shards] == [
        ("shard-00000.tar", 2),
        ("shard-00001.tar", 2),
        ("shard-00002.tar", 2),
    ]
    totals = {source: (total.samples, total.frames) for source, total in shards.sources.items()}
    assert totals == {"moving_shapes": (5, 20), "noise": (1, 7)}


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    written = samples(3)
    write(tmp_path, written)
    found: list[dict[str, Any]] = []
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as file:
            found += ({**sample} for sample in group_by_keys(tar_file_expander([{"url": path.name, "stream": file}])))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in written]
    for sample, expected in zip(found, written, strict=True):
        facts = json.loads(sample["json"])
        assert facts["caption"] == expected.caption and facts["color"] == expected.extra["color"]
        assert np.array_equal(np.load(io.BytesIO(sample["frames.npy"]), allow_pickle=False), expected.frames)


def test_a_plain_tar_reader_sees_webdataset_groups(tmp_path: Path) -> None:
    written = samples(3)
    shards = ShardSet(write(tmp_path, written, max_samples=3))
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        members = tar.getmembers()
        # webdataset takes all up to the first dot as the key, and neighbours with one key as one sample.
        assert [member.name.split(".", 1) for member in members] == [
            [sample.key, extension] for sample in written for extension in ("json", "frames.npy")
        ]
        for entry, sample in zip(shards.entries, written, strict=True):
            facts = json.load(tar.extractfile(f"{entry.key}.json"))  # pyright: ignore[reportArgumentType]
            array = tar.extractfile(f"{entry.key}.frames.npy").read()  # pyright: ignore[reportOptionalMemberAccess]
            assert facts["caption"] == sample.caption and facts["color"] == sample.extra["color"]
            assert np.array_equal(np.load(io.BytesIO(array), allow_pickle=False), sample.frames)
        assert [entry.offset for entry in shards.entries] == [member.offset_data for member in members[1::2]]
        assert [entry.json_offset for entry in shards.entries] == [member.offset_data for member in members[::2]]


def test_equal_samples_make_equal_shards(tmp_path: Path) -> None:
    one, two = (ShardSet(write(tmp_path / name, samples())) for name in ("one", "two"))
    assert one.index == two.index


def test_a_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    shards = ShardSet(write(tmp_path, samples()))
    expected = shards.index.shards[1].sha256
    flip(tmp_path / "shard-00001.tar", shards.entries[2].offset + 1000)
    with pytest.raises(ShardCorrupt, match=r"shard-00001\.tar: corrupt shard") as found:
        shards.verify()
    assert found.value.expected == expected != found.value.found
    assert expected in str(found.value) and found.value.found in str(found.value)


@pytest.mark.parametrize("member", ["offset", "json_offset"])
def test_a_broken_member_is_an_error_even_without_verify(tmp_path: Path, member: str) -> None:
    shards = ShardSet(write(tmp_path, samples()))
    flip(tmp_path / "shard-00000.tar", getattr(shards.entries[0], member))
    with pytest.raises(SampleCorrupt, match=r"shard-00000\.tar: sample 'moving_shapes-000000' is corrupt"):
        shards.sample(0)
    assert shards.sample(1).key == "moving_shapes-000001"


def test_a_truncated_or_missing_shard_is_found_on_opening(tmp_path: Path) -> None:
    path = write(tmp_path, samples()) / "shard-00002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ShardCorrupt, match=r"shard-00002\.tar"):
        ShardSet(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00002\.tar: the shard is missing"):
        ShardSet(tmp_path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    shards = ShardSet(write(tmp_path, samples()))
    entry, path = shards.entries[0], tmp_path / "shard-00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: entry.offset] + data[entry.offset :].replace(b"'|u1'", b"'|O' ", 1))
    drop_checksums(tmp_path)
    with pytest.raises(SampleCorrupt, match="its array is"):
        ShardSet(tmp_path).sample(0)


def test_a_set_without_its_index_is_not_a_set(tmp_path: Path) -> None:
    (write(tmp_path, samples()) / "index.json").unlink()
    with pytest.raises(ValueError, match=r"not a whole shard set: it has no index\.json"):
        ShardSet(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 3}, "schema_version"),
        ({"shards": []}, "samples by shard"),
        ({"extra": 1}, "extra"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = write(tmp_path, samples()) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"index\.json: not a shard index of schema version 1 or 2") as refused:
        ShardSet(tmp_path)
    assert reason in str(refused.value)


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, max_samples=2) as writer:
        for sample in samples():
            writer.write(sample)
        raise ZeroDivisionError("any error of the caller")
    assert list(tmp_path.iterdir()) == []


def test_shards_of_a_killed_attempt_are_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "shard-00007.tar").write_bytes(b"half")
    (tmp_path / ".index.json.part").write_text("{")
    write(tmp_path, samples(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-00000.tar"]


def test_a_whole_set_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path, samples(2))
    with pytest.raises(ValueError, match="already holds a shard set"):
        ShardWriter(tmp_path)
    ShardSet(tmp_path).verify()


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample was written"):
        write(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Sample("a.b", noise("x").frames, "c", "s", "l", "c", 1.0, 1, 1), "key 'a.b' must be"),
        (Sample("x", noise("x").frames.astype(np.float32), "c", "s", "l", "c", 1.0, 1, 1), "not float32"),  # pyright: ignore[reportArgumentType]
        (Sample("x", noise("x").frames[0], "c", "s", "l", "c", 1.0, 1, 1), r"not uint8 [10, 14, 3]"),
        (Sample("x", noise("x").frames[:0], "c", "s", "l", "c", 1.0, 1, 1), "not uint8 [0, 10, 14, 3]"),
        (Sample("x", noise("x").frames, " ", "s", "l", "c", 1.0, 1, 1), "has no caption"),
        (Sample("x", noise("x").frames, "c", "s", "l", "c", 1.0, 1, 1, {"fps": 2}), "extra may not hold ['fps']"),
        (noise("first"), "key 'first' is given twice"),
    ],
)
def test_a_sample_that_cannot_be_stored_is_refused(tmp_path: Path, bad: Sample, reason: str) -> None:
    with pytest.raises(ValueError) as refused, ShardWriter(tmp_path) as writer:
        writer.write(noise("first"))
        writer.write(bad)
    assert reason in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_set_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    wanted = ShardSet(write(tmp_path, samples())).sample(3)
    drop_checksums(tmp_path)
    shards = ShardSet(tmp_path)
    shards.verify()
    assert np.array_equal(shards.sample(3).frames, wanted.frames)
    assert shards.still_caption(3) == wanted.extra["image_caption"]


def test_a_sample_without_its_checksum_is_refused_in_the_second_version(tmp_path: Path) -> None:
    path = write(tmp_path, samples()) / "index.json"
    index = json.loads(path.read_text())
    index["samples"][2]["crc32"] = None
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="sample 'moving_shapes-000002' has no size or no crc32"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("encoding", [None, Encoding(keyframe_every=4)])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_flipped_pixel_is_a_corrupt_sample(tmp_path: Path, encoding: Encoding | None, share: float) -> None:
    with ShardWriter(tmp_path, encoding=encoding) as writer:
        for sample in samples():
            writer.write(sample)
    entry = ShardSet(tmp_path).entries[1]
    assert entry.size is not None
    flip(tmp_path / "shard-00000.tar", entry.offset + int(share * entry.size))
    with pytest.raises(SampleCorrupt, match="its bytes are not those that were written"):
        ShardSet(tmp_path).sample(1)


def drifting(frames: int = 30) -> Sample:
    """A smooth picture that moves a pixel a frame, so that a frame is told from its neighbours."""
    y, x = np.mgrid[0:48, 0:64]
    picture = np.stack([128 + 100 * np.sin(x / 5), 128 + 100 * np.cos(y / 5), 2.0 * (x + y)], -1).astype(np.uint8)
    return Sample("d", np.stack([np.roll(picture, at, 1) for at in range(frames)]), "c", "s", "l", "c", 23.976, 48, 64)


def test_an_encoded_clip_is_small_and_close_to_what_was_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, encoding=Encoding()) as writer:
        writer.write(drifting())
    shards = ShardSet(tmp_path)
    read, wanted = shards.sample(0), drifting()
    assert read.frames.shape == wanted.frames.shape and read.caption == wanted.caption and read.fps == 23.976
    assert np.abs(read.frames.astype(int) - wanted.frames).mean() < 6
    assert shards.index.shards[0].size < wanted.frames.nbytes / 10
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames() == ["d.json", "d.mp4"]


@pytest.mark.parametrize("encoding", [None, Encoding(keyframe_every=7)])
@pytest.mark.parametrize("places", [[0], [29], [3, 6, 9], [0, 13, 26], [11, 11, 2], []])
def test_frames_at_places_are_those_of_the_whole_clip(
    tmp_path: Path, encoding: Encoding | None, places: list[int]
) -> None:
    with ShardWriter(tmp_path, encoding=encoding) as writer:
        writer.write(drifting())
    shards = ShardSet(tmp_path)
    assert np.array_equal(shards.sample(0, places).frames, shards.sample(0).frames[places])


def test_a_clip_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    odd = Sample("odd", np.zeros((2, 11, 14, 3), np.uint8), "c", "s", "l", "c", 8.0, 11, 14)
    with (
        pytest.raises(ValueError, match="frames of 11x14 cannot be encoded"),
        ShardWriter(tmp_path, encoding=Encoding()) as writer,
    ):
        writer.write(odd)
    assert list(tmp_path.iterdir()) == []


def test_the_caption_of_a_still_needs_no_shard(tmp_path: Path) -> None:
    shards = ShardSet(write(tmp_path, [*samples(), noise("n")]))
    wanted = [shards.sample(position).extra.get("image_caption") for position in range(6)]
    for shard in tmp_path.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert [shards.still_caption(position) for position in range(6)] == wanted and wanted[-1] is None
