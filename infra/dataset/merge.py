"""Merge and split: shard sets made of others.

It owns which shards and samples go where; the format is `model.data.shards`'. A merge links or copies whole shards and
joins the indexes, so it costs no more than a directory entry a shard on one disk; a split copies samples as stored.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from model.config import Ratio
from model.data.shard_writer import ShardWriter
from model.data.shards import INDEX, SCHEMA_VERSION, SampleEntry, ShardEntry, ShardIndex, ShardSet, SourceTotals


def merge(folders: Sequence[Path], out: Path) -> ShardSet:
    """One set of the shards of several, under new numbers; nothing is encoded, or left behind on failure.

    Raises:
        ValueError: a key is in two sets, sets are of different kinds or of version 1, or `out` holds a set already.
    """
    sets = [ShardSet(folder) for folder in folders]
    if not sets:
        raise ValueError("give at least one shard set to merge")
    _require_alike(sets)
    if (out / INDEX).exists():
        raise ValueError(f"{out} already holds a shard set; write to another folder or delete this one")
    out.mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    samples: list[SampleEntry] = []
    placed: list[Path] = []
    try:
        for each in sets:
            first = len(shards)
            for shard in each.index.shards:
                target = out / f"shard-{len(shards):05d}.tar"
                target.unlink(missing_ok=True)
                placed.append(target)
                _place(each.folder / shard.name, target)
                shards.append(shard.model_copy(update={"name": target.name}))
            samples += [entry.model_copy(update={"shard": entry.shard + first}) for entry in each.entries]
        index = ShardIndex(
            schema_version=SCHEMA_VERSION,
            shards=tuple(shards),
            samples=tuple(samples),
            totals=_totals([each.sources for each in sets]),
            latents=sets[0].index.latents,
        )
        part = out / f".{INDEX}.part"
        part.write_text(index.model_dump_json(indent=1) + "\n")
        part.replace(out / INDEX)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    return ShardSet(out)


def split(folder: Path, out: Mapping[str, Path], shares: Mapping[str, Ratio], by: str = "item") -> dict[str, int]:
    """Cut a set into parts by share, and say how many samples each got; shares add up to 1.

    Samples with the same fact `by` stay together, so that no film is in training and held out at once; which part they
    go to is a function of that fact alone. A sample without it is on its own.
    """
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares add up to {sum(shares.values()):g}, not to 1: {dict(shares)}")
    source = ShardSet(folder)
    chosen: dict[str, list[int]] = {name: [] for name in shares}
    for position in range(len(source)):
        facts, _ = source.stored(position)
        told = facts.get(by)
        group = str(told) if told is not None else source.entries[position].key
        chosen[_part(group, shares)].append(position)
    empty = [name for name, positions in chosen.items() if not positions]
    if empty:
        raise ValueError(f"part '{empty[0]}' would be empty: the set has too few of fact '{by}'; change the shares")
    for name, positions in chosen.items():
        copy_samples(source, positions, out[name])
    return {name: len(positions) for name, positions in chosen.items()}


def copy_samples(source: ShardSet, positions: Sequence[int], out: Path) -> None:
    """Write some samples of a set as a set of their own, byte for byte."""
    with ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(out, latents=source.index.latents))
        for position in positions:
            facts, clip = source.stored(position)
            writer.write_stored(source.entries[position], facts, clip)


def _part(group: str, shares: Mapping[str, Ratio]) -> str:
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    bound = 0.0
    for name, share in shares.items():
        bound += share
        if place < bound:
            return name
    return list(shares)[-1]


def _require_alike(sets: Sequence[ShardSet]) -> None:
    seen: dict[str, Path] = {}
    for each in sets:
        if each.index.schema_version != SCHEMA_VERSION:
            raise ValueError(f"{each.folder} is of version {each.index.schema_version}; write it with this version")
        if each.index.latents != sets[0].index.latents:
            raise ValueError(f"{each.folder} and {sets[0].folder} hold clips of different kinds or codecs")
        for entry in each.entries:
            if entry.key in seen:
                raise ValueError(f"key '{entry.key}' is in {seen[entry.key]} and in {each.folder}; keys are unique")
            seen[entry.key] = each.folder


def _place(source: Path, target: Path) -> None:
    """A hard link where one can be: shards never change."""
    try:
        os.link(source, target)
    except OSError:
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)


def _totals(sources: Sequence[Mapping[str, SourceTotals]]) -> dict[str, SourceTotals]:
    samples: dict[str, int] = {}
    frames: dict[str, int] = {}
    for each in sources:
        for name, totals in each.items():
            samples[name] = samples.get(name, 0) + totals.samples
            frames[name] = frames.get(name, 0) + totals.frames
    return {name: SourceTotals(samples=samples[name], frames=frames[name]) for name in sorted(samples)}
