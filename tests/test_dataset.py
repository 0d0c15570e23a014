"""Shard sets as wholes: split, merged, described, checked and looked at, by the functions and by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from infra.dataset.merge import merge, split
from infra.dataset.statistics import statistics_of, verify
from model.data.encoding import Encoding
from model.data.shard_writer import ShardWriter
from model.data.shards import Sample, ShardSet


def sample(name: str, item: str, *, frames: int = 6) -> Sample:
    pixels = np.random.default_rng(len(name)).integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8)
    extra = {"item": item, "scores": {"motion": float(frames)}}
    return Sample(name, pixels, f"clip <{name}>", "films", "CC0", "nobody", 10.0, 16, 16, extra)


def write(folder: Path, names: list[str], encoding: Encoding | None = None) -> Path:
    with ShardWriter(folder, max_samples=4, encoding=encoding) as writer:
        for name in names:
            writer.write(sample(name, item=name.split("-")[0]))
    return folder


def test_a_merged_set_holds_every_sample_bit_for_bit_and_copies_no_byte(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [f"a-{number}" for number in range(6)], Encoding())
    two = write(tmp_path / "two", [f"b-{number}" for number in range(3)])
    both = merge([one, two], tmp_path / "both")
    assert [shard.samples for shard in both.index.shards] == [4, 2, 3]
    assert verify(both.folder) == []
    assert both.sources["films"].samples == 9 and both.sources["films"].frames == 54
    assert np.array_equal(both.sample(7).frames, ShardSet(two).sample(1).frames)
    assert (tmp_path / "both" / "shard-00002.tar").stat().st_ino == (two / "shard-00000.tar").stat().st_ino
    with pytest.raises(ValueError, match="already holds"):
        merge([one], both.folder)
    with pytest.raises(ValueError, match="key 'a-0' is in"):
        merge([one, both.folder], tmp_path / "twice")
    assert not list((tmp_path / "twice").glob("*"))


def test_a_split_keeps_a_films_clips_together_and_loses_none(tmp_path: Path) -> None:
    names = [f"f{film}-{number}" for film in range(20) for number in range(3)]
    whole = write(tmp_path / "whole", names)
    parts = {"train": tmp_path / "train", "heldout": tmp_path / "heldout"}
    counts = split(whole, parts, {"train": 0.7, "heldout": 0.3})
    films = {name: {entry.key.split("-")[0] for entry in ShardSet(path).entries} for name, path in parts.items()}
    assert not films["train"] & films["heldout"] and len(films["train"] | films["heldout"]) == 20
    assert sum(counts.values()) == 60 and counts["train"] > counts["heldout"] > 0
    assert verify(parts["train"]) == []
    with pytest.raises(ValueError, match=r"add up to 1.2"):
        split(whole, parts, {"train": 0.7, "heldout": 0.5})


def test_damage_is_named_by_shard_and_by_sample(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["a-0", "a-1"])
    entry = ShardSet(folder).entries[1]
    shard = folder / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    data[entry.offset + 500] ^= 255
    shard.write_bytes(bytes(data))
    problems = verify(folder)
    assert len(problems) == 2
    assert "expected sha256" in problems[0] and "'a-1' is corrupt" in problems[1]


def stiv(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


def test_the_commands_show_check_and_draw_a_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["a-0", "b-1"], Encoding())
    raw = write(tmp_path / "raw", ["c-0"])
    assert "2 samples in 1 shards" in stiv("inspect", folder)
    assert json.loads(stiv("inspect", folder, "--key", "b-1"))["licence"] == "CC0"
    assert "0 problems" in stiv("verify", folder)
    told = json.loads(stiv("stats", folder, "--json"))
    assert (told["samples"], told["frames"], told["seconds"]) == (2, 12, pytest.approx(1.2))
    assert told["quantiles"]["motion"] == [6.0] * 7 and told["licences"] == {"CC0": 2}
    assert "CC0" in stiv("stats", folder)
    assert "3 samples" in stiv("merge", folder, raw, "--out", tmp_path / "both")
    stiv("view", tmp_path / "both", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:video/mp4") == 2 and page.count("data:image/jpeg") == 5
    assert "clip &lt;a-0&gt;" in page and "clip <a-0>" not in page
    parts = stiv("split", folder, "--out", tmp_path, "--part", "one=0.5", "--part", "two=0.5")
    assert parts.count("1 samples") == 2
    bad = CliRunner().invoke(app, ["data", "split", str(folder), "--out", str(tmp_path), "--part", "one"])
    assert isinstance(bad.exception, ValueError) and "NAME=SHARE" in str(bad.exception)
    assert statistics_of(raw).encodings == {"frames": 1}
