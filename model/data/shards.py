"""Shards: clips and their captions in tar files that webdataset can read, with an index that makes them a set.

It owns the file format and its integrity; it knows nothing of where clips come from or how they are batched. A set is a
folder of `shard-NNNNN.tar` (members `KEY.json`, `KEY.frames.npy`) and an `index.json` that is written last, at one
stroke: without it the folder is an unfinished attempt.
"""

import hashlib
import io
import json
import logging
import mmap
import os
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field, JsonValue, ValidationError, model_validator

from model.config import Config, Positive

logger = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=0)]

SCHEMA_VERSION = 1
INDEX = "index.json"

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_FACTS = frozenset(("caption", "source", "licence", "credit", "fps", "original_height", "original_width"))
"""Fields of `Sample` that `KEY.json` holds beside its `extra`."""
_OPEN_SHARDS = 64
"""Shards mapped at a time; each holds a file descriptor."""


class ShardCorrupt(ValueError):
    """A shard whose bytes are not those the index was written for."""

    def __init__(self, path: Path, *, expected: str, found: str) -> None:
        super().__init__(
            f"{path}: corrupt shard: expected sha256 {expected}, found {found}; copy it again or write the set anew"
        )
        self.path = path
        self.expected = expected
        self.found = found


@dataclass(frozen=True, slots=True)
class Sample:
    """A clip with what is known of it."""

    key: str
    """Unique in its set; letters, digits, `_` and `-`."""
    frames: npt.NDArray[np.uint8]
    """uint8 [T, H, W, 3]."""
    caption: str
    source: str
    """Part of the data set it belongs to, the name that a recipe's `data.weights` uses."""
    licence: str
    credit: str
    fps: float
    original_height: int
    original_width: int
    extra: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """Further facts, such as `image_caption`, or colour, shape and direction of a drawn clip."""


class ShardEntry(Config):
    """A shard file as the index describes it."""

    name: Annotated[str, Field(pattern=r"^shard-\d{5,}\.tar$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Positive
    samples: Positive


class SampleEntry(Config):
    """Where a sample lies and the little that choosing samples needs."""

    key: str
    source: str
    caption: str
    num_frames: Positive
    shard: Count
    """Position in `shards`."""
    offset: Count
    """First byte of `KEY.frames.npy` in the shard, behind its tar header."""
    json_offset: Count
    json_size: Positive


class SourceTotals(Config):
    """How much of the set one source makes up."""

    samples: int
    frames: int


class ShardIndex(Config):
    """`index.json`."""

    schema_version: Literal[1]
    shards: tuple[ShardEntry, ...]
    samples: tuple[SampleEntry, ...]
    totals: dict[str, SourceTotals]

    @model_validator(mode="after")
    def _samples_lie_in_shards(self) -> Self:
        held = Counter(entry.shard for entry in self.samples)
        if held != Counter({position: shard.samples for position, shard in enumerate(self.shards)}):
            raise ValueError(f"samples by shard are {dict(held)}, the shards hold {[s.samples for s in self.shards]}")
        return self


class ShardWriter:
    """Writes a shard set; a context manager, because leaving it is what completes the set.

    Left by an exception it takes back every file it wrote, so that nothing is half-written.
    """

    def __init__(self, folder: Path, max_samples: int = 512) -> None:
        if max_samples < 1:
            raise ValueError(f"max_samples {max_samples} must be at least 1")
        if (folder / INDEX).exists():
            raise ValueError(f"{folder} already holds a shard set; write to another folder or delete this one")
        self.folder = folder
        self.max_samples = max_samples
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
        self._check(sample)
        if self._tar is None:
            path = self.folder / f"shard-{len(self._shards):05d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed by _close_shard
        facts = _facts(sample)
        array = io.BytesIO()
        np.save(array, np.ascontiguousarray(sample.frames), allow_pickle=False)
        json_offset = _add(self._tar, f"{sample.key}.json", facts)
        offset = _add(self._tar, f"{sample.key}.frames.npy", array.getvalue())
        self._samples[sample.key] = SampleEntry(
            key=sample.key,
            source=sample.source,
            caption=sample.caption,
            num_frames=sample.frames.shape[0],
            shard=len(self._shards),
            offset=offset,
            json_offset=json_offset,
            json_size=len(facts),
        )
        self._tar_samples += 1
        if self._tar_samples == self.max_samples:
            self._close_shard()

    def _check(self, sample: Sample) -> None:
        if not _KEY.fullmatch(sample.key):
            raise ValueError(f"key {sample.key!r} must be 1 to 80 letters, digits, '_' or '-'")
        if sample.key in self._samples:
            raise ValueError(f"key {sample.key!r} is given twice; keys are unique in a set")
        shape, kind = sample.frames.shape, sample.frames.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"sample {sample.key!r}: frames must be uint8 [T, H, W, 3], not {kind} {list(shape)}")
        if not sample.caption.strip():
            raise ValueError(f"sample {sample.key!r} has no caption")
        taken = _FACTS & set(sample.extra)
        if taken:
            raise ValueError(
                f"sample {sample.key!r}: extra may not hold {sorted(taken)}, which are fields of their own"
            )

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self.folder / f"shard-{len(self._shards):05d}.tar"
        _sync(path)
        size = path.stat().st_size
        self._shards.append(ShardEntry(name=path.name, sha256=_sha256(path), size=size, samples=self._tar_samples))
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


class ShardSet:
    """A whole shard set, read sample by sample; frames stay in the mapped file until they are used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        self._mapped = lru_cache(maxsize=_OPEN_SHARDS)(self._map)
        for shard in self.index.shards:
            path = folder / shard.name
            if not path.is_file():
                raise ValueError(f"{path}: the shard is missing from its set; copy the whole folder again")
            if path.stat().st_size != shard.size:
                raise self._corrupt(shard)

    def __len__(self) -> int:
        return len(self.index.samples)

    @property
    def entries(self) -> Sequence[SampleEntry]:
        return self.index.samples

    @property
    def sources(self) -> Mapping[str, SourceTotals]:
        """What the set holds of each source, by name."""
        return self.index.totals

    def sample(self, position: int) -> Sample:
        """The sample at `position`; its frames are a read-only view of the file."""
        entry = self.index.samples[position]
        mapped = self._mapped(entry.shard)
        header_end = entry.offset + 10 + int.from_bytes(mapped[entry.offset + 8 : entry.offset + 10], "little")
        try:
            facts = cast(
                dict[str, JsonValue], json.loads(mapped[entry.json_offset : entry.json_offset + entry.json_size])
            )
            shape = _frames_shape(mapped[entry.offset : header_end])
            frames = np.frombuffer(mapped, np.uint8, int(np.prod(shape)), header_end).reshape(shape)
            return _sample(entry.key, frames, facts)
        except (ValueError, KeyError, TypeError) as error:
            raise self._corrupt(self.index.shards[entry.shard]) from error

    def verify(self) -> None:
        """Read every byte and compare the digests; `ShardCorrupt` names the first shard that differs."""
        for shard in self.index.shards:
            if _sha256(self.folder / shard.name) != shard.sha256:
                raise self._corrupt(shard)

    def _map(self, shard: int) -> mmap.mmap:
        with (self.folder / self.index.shards[shard].name).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _corrupt(self, shard: ShardEntry) -> ShardCorrupt:
        path = self.folder / shard.name
        return ShardCorrupt(path, expected=shard.sha256, found=_sha256(path))


def _read_index(folder: Path) -> ShardIndex:
    path = folder / INDEX
    try:
        return ShardIndex.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a whole shard set: it has no {INDEX}; write the set (again)") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{path}: not a shard index of schema version {SCHEMA_VERSION}: {where} {first['msg']}"
        ) from None


def _facts(sample: Sample) -> bytes:
    facts = {**sample.extra, **{name: getattr(sample, name) for name in _FACTS}}
    return json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()


def _sample(key: str, frames: npt.NDArray[np.uint8], facts: dict[str, JsonValue]) -> Sample:
    return Sample(
        key=key,
        frames=frames,
        caption=str(facts.pop("caption")),
        source=str(facts.pop("source")),
        licence=str(facts.pop("licence")),
        credit=str(facts.pop("credit")),
        fps=float(cast(float, facts.pop("fps"))),
        original_height=int(cast(int, facts.pop("original_height"))),
        original_width=int(cast(int, facts.pop("original_width"))),
        extra=facts,
    )


@lru_cache(maxsize=256)
def _frames_shape(header: bytes) -> tuple[int, ...]:
    """Shape in the header of an .npy file of uint8 [T, H, W, 3]; ValueError for any other."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"frames are {dtype} {shape}")
    return shape


def _totals(samples: Sequence[SampleEntry]) -> dict[str, SourceTotals]:
    frames: dict[str, list[int]] = {}
    for entry in samples:
        frames.setdefault(entry.source, []).append(entry.num_frames)
    return {source: SourceTotals(samples=len(frames[source]), frames=sum(frames[source])) for source in sorted(frames)}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member with no date and no owner, so that equal samples make equal shards; where its data begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
