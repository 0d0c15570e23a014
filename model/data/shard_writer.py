"""Writes shard sets: whole or not at all.

It owns the order in which files appear and which samples are refused; the format itself is `shards`'.
"""

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from model.data.encoding import Encoding, encode
from model.data.shards import (
    INDEX,
    LEFT,
    SCHEMA_VERSION,
    SUFFIXES,
    TOP,
    LatentsOf,
    Sample,
    SampleEntry,
    ShardEntry,
    ShardIndex,
    SourceTotals,
    checksum,
    sha256_of,
)

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_FACTS = frozenset(("caption", "source", "licence", "credit", "fps", "original_height", "original_width"))
"""Fields of `Sample` that `KEY.json` holds beside its `extra`."""


class ShardWriter:
    """Writes a shard set; a context manager, because leaving it is what completes the set.

    With an `encoding` clips are stored as `KEY.mp4`; a set of `latents` is given them sample by sample; else frames are
    stored raw, byte for byte. Left by an exception it takes back every file it wrote, so that nothing is half-written.
    """

    def __init__(
        self,
        folder: Path,
        max_samples: int = 512,
        encoding: Encoding | None = None,
        latents: LatentsOf | None = None,
    ) -> None:
        if max_samples < 1:
            raise ValueError(f"max_samples {max_samples} must be at least 1")
        if (folder / INDEX).exists():
            raise ValueError(f"{folder} already holds a shard set; write to another folder or delete this one")
        self.folder = folder
        self.max_samples = max_samples
        self.encoding = encoding
        self.latents = latents
        self._shards: list[ShardEntry] = []
        self._samples: dict[str, SampleEntry] = {}
        self._tar: tarfile.TarFile | None = None
        self._tar_samples = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        left = self._remove_shards()
        if left:
            logger.warning("removed %s shards of an unfinished attempt from %s", left, self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._abandon()
            raise
        if kind is not None:
            self._abandon()

    def write(self, sample: Sample) -> None:
        """Add a clip of pixels."""
        assert self.latents is None, "a set of latents takes write_latents"
        self._check(sample)
        if self.encoding is None:
            self._add(sample.key, _facts(sample), "frames", _npy(sample.frames), len(sample.frames))
        else:
            clip = encode(sample.frames, sample.fps, self.encoding)
            self._add(sample.key, _facts(sample), "mp4", clip, len(sample.frames))

    def write_stored(self, entry: SampleEntry, facts: Mapping[str, JsonValue], clip: bytes) -> None:
        """Add a sample of another set, its clip as it is stored there, its `facts` as they are or amended."""
        self._check_key(entry.key)
        missing = _FACTS - set(facts)
        if missing or not str(facts["caption"]).strip():
            raise ValueError(f"sample {entry.key!r} has no {', '.join(sorted(missing)) or 'caption'}")
        if (entry.encoding == "latents") != (self.latents is not None):
            raise ValueError(f"sample {entry.key!r} is stored as {entry.encoding}, which this set does not hold")
        self._add(entry.key, facts, entry.encoding, clip, entry.num_frames)

    def write_latents(self, sample: Sample, latents: npt.NDArray[np.floating], *, top: float, left: float) -> None:
        """Add the `latents` [T, C, h, w] of all frames of `sample`, encoded from `top`, `left` of its original."""
        assert self.latents is not None, "a set of pixels takes write"
        self._check(sample)
        if len(latents) != len(sample.frames):
            raise ValueError(f"sample '{sample.key}' has {len(sample.frames)} frames, its latents {len(latents)}")
        if not np.abs(latents).max() <= np.finfo(self.latents.dtype).max:  # a NaN is within nothing
            raise ValueError(
                f"sample '{sample.key}': latents up to {np.abs(latents).max():g} do not fit {self.latents.dtype};"
                " store float32, or normalise the codec"
            )
        stored = _npy(latents.astype(self.latents.dtype))
        self._add(sample.key, _facts(sample, {TOP: top, LEFT: left}), "latents", stored, len(sample.frames))

    def _add(
        self,
        key: str,
        told: Mapping[str, JsonValue],
        kind: Literal["frames", "mp4", "latents"],
        clip: bytes,
        num_frames: int,
    ) -> None:
        image_caption = told.get("image_caption")
        facts = json.dumps(told, sort_keys=True, ensure_ascii=False).encode()
        if self._tar is None:
            path = self.folder / f"shard-{len(self._shards):05d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed by _close_shard
        json_offset = _append(self._tar, f"{key}.json", facts)
        offset = _append(self._tar, f"{key}.{SUFFIXES[kind]}", clip)
        self._samples[key] = SampleEntry(
            key=key,
            source=str(told["source"]),
            caption=str(told["caption"]),
            image_caption=image_caption if isinstance(image_caption, str) else None,
            num_frames=num_frames,
            shard=len(self._shards),
            offset=offset,
            json_offset=json_offset,
            json_size=len(facts),
            encoding=kind,
            size=len(clip),
            crc32=checksum(facts, clip),
        )
        self._tar_samples += 1
        if self._tar_samples == self.max_samples:
            self._close_shard()

    def _check_key(self, key: str) -> None:
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r} must be 1 to 80 letters, digits, '_' or '-'")
        if key in self._samples:
            raise ValueError(f"key {key!r} is given twice; keys are unique in a set")

    def _check(self, sample: Sample) -> None:
        self._check_key(sample.key)
        shape, kind = sample.frames.shape, sample.frames.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"sample {sample.key!r}: frames must be uint8 [T, H, W, 3], not {kind} {list(shape)}")
        if not sample.caption.strip():
            raise ValueError(f"sample {sample.key!r} has no caption")
        taken = (_FACTS | {TOP, LEFT}) & set(sample.extra)
        if taken:
            raise ValueError(
                f"sample {sample.key!r}: extra may not hold {sorted(taken)}, which have a place of their own"
            )

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self.folder / f"shard-{len(self._shards):05d}.tar"
        _sync(path)
        size = path.stat().st_size
        self._shards.append(ShardEntry(name=path.name, sha256=sha256_of(path), size=size, samples=self._tar_samples))
        self._tar, self._tar_samples = None, 0

    def _finish(self) -> None:
        if not self._samples:
            raise ValueError(f"no sample was written to {self.folder}: an empty shard set is of no use")
        self._close_shard()
        samples = tuple(self._samples.values())
        index = ShardIndex(
            schema_version=SCHEMA_VERSION,
            shards=tuple(self._shards),
            samples=samples,
            totals=_totals(samples),
            latents=self.latents,
        )
        part = self.folder / f".{INDEX}.part"
        part.write_text(index.model_dump_json(indent=1) + "\n")
        _sync(part)
        part.replace(self.folder / INDEX)
        _sync(self.folder)

    def _abandon(self) -> None:
        if self._tar is not None:
            self._tar.close()
        for name in (INDEX, f".{INDEX}.part"):
            (self.folder / name).unlink(missing_ok=True)
        self._remove_shards()

    def _remove_shards(self) -> int:
        paths = list(self.folder.glob("shard-*.tar"))
        for path in paths:
            path.unlink()
        return len(paths)


def _facts(sample: Sample, more: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue]:
    return {**sample.extra, **{name: getattr(sample, name) for name in _FACTS}, **(more or {})}


def _npy(values: npt.NDArray[Any]) -> bytes:
    array = io.BytesIO()
    np.save(array, np.ascontiguousarray(values), allow_pickle=False)
    return array.getvalue()


def _totals(samples: Sequence[SampleEntry]) -> dict[str, SourceTotals]:
    frames: dict[str, list[int]] = {}
    for entry in samples:
        frames.setdefault(entry.source, []).append(entry.num_frames)
    return {source: SourceTotals(samples=len(frames[source]), frames=sum(frames[source])) for source in sorted(frames)}


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member with no date and no owner, so that equal samples make equal shards; where its data begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
