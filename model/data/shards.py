"""Shards: clips and their captions in tar files that webdataset can read, with an index that makes them a set.

It owns the file format, how a sample is read and how damage is found; it knows nothing of where clips come from, how
sets are written (`shard_writer`) or how clips are batched. A set is a folder of `shard-NNNNN.tar` (members `KEY.json`
and `KEY.frames.npy`, or `KEY.mp4` where the clip is encoded, or `KEY.latents.npy` in a set of latents) and an
`index.json` that is written last: without it the folder is an unfinished attempt. Where a `ShardCache` is given, shards
that the folder lacks come from a store.
"""

import hashlib
import io
import json
import mmap
import zlib
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field, JsonValue, ValidationError, model_validator

from model.config import Config, Positive
from model.data.cache import ShardCache
from model.data.encoding import decode

Count = Annotated[int, Field(ge=0)]

SCHEMA_VERSION = 2
"""What is written. Version 1, which is still read, had raw frames only and no checksums by sample."""
INDEX = "index.json"
SUFFIXES = {"frames": "frames.npy", "mp4": "mp4", "latents": "latents.npy"}
"""Ending of a clip's member in the tar, by the index's word for it."""

TOP, LEFT = "crop_top", "crop_left"
"""Facts of a sample of latents: where the encoded part begins, in pixels of the original."""
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


class SampleCorrupt(ValueError):
    """A sample that cannot be used: other bytes than were written, no frames in them, or frames of another shape."""


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


@dataclass(frozen=True, slots=True)
class LatentSample:
    """A clip as a codec's latents, with what a batch needs to know of it."""

    key: str
    latents: npt.NDArray[np.floating]
    """[T, C, h, w], of the set's dtype."""
    caption: str
    original_height: int
    original_width: int
    top: float
    """Where the encoded part begins, in pixels of the original."""
    left: float
    extra: Mapping[str, JsonValue]


class LatentsOf(Config):
    """What the latents of a set are of."""

    codec: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Sha256 of the header of the codec that encoded them, which names its weights."""
    height: Positive
    """Pixels that were encoded."""
    width: Positive
    dtype: Literal["float16", "float32"]


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
    image_caption: str | None = None
    """What any single frame shows, where the sample's `extra` says so."""
    num_frames: Positive
    shard: Count
    """Position in `shards`."""
    offset: Count
    """First byte of the clip's member in the shard, behind its tar header."""
    json_offset: Count
    json_size: Positive
    encoding: Literal["frames", "mp4", "latents"] = "frames"
    size: Positive | None = None
    """Bytes of the clip's member."""
    crc32: Count | None = None
    """Of `KEY.json` and then the clip's member."""


class SourceTotals(Config):
    """How much of the set one source makes up."""

    samples: int
    frames: int


class ShardIndex(Config):
    """`index.json`."""

    schema_version: Literal[1, 2]
    shards: tuple[ShardEntry, ...]
    samples: tuple[SampleEntry, ...]
    totals: dict[str, SourceTotals]
    latents: LatentsOf | None = None
    """Of a set of latents; None where clips are pixels."""

    @model_validator(mode="after")
    def _samples_are_of_one_kind(self) -> Self:
        odd = next((e.key for e in self.samples if (e.encoding == "latents") != (self.latents is not None)), None)
        if odd is not None:
            raise ValueError(f"sample '{odd}' and the set disagree whether clips are latents")
        return self

    @model_validator(mode="after")
    def _samples_lie_in_shards(self) -> Self:
        held = Counter(entry.shard for entry in self.samples)
        if held != Counter({position: shard.samples for position, shard in enumerate(self.shards)}):
            raise ValueError(f"samples by shard are {dict(held)}, the shards hold {[s.samples for s in self.shards]}")
        return self

    @model_validator(mode="after")
    def _samples_have_checksums(self) -> Self:
        bare = (entry.key for entry in self.samples if entry.size is None or entry.crc32 is None)
        if self.schema_version > 1 and (key := next(bare, None)) is not None:
            raise ValueError(f"sample '{key}' has no size or no crc32")
        return self


class ShardSet:
    """A whole shard set, read sample by sample; frames stay in the mapped file until they are used.

    Pickled it is its folder and cache: another process opens the files for itself.
    """

    def __init__(self, folder: Path, cache: ShardCache | None = None) -> None:
        self.folder = folder
        self.cache = cache
        self.index = _read_index(folder)
        self._mapped = lru_cache(maxsize=_OPEN_SHARDS)(self._map)
        self._checked = bytearray(len(self.index.samples))
        for shard in self.index.shards:
            path = folder / shard.name
            if not path.is_file():
                if cache is None:
                    raise ValueError(f"{path}: the shard is missing from its set; copy the whole folder again")
            elif path.stat().st_size != shard.size:
                raise ShardCorrupt(path, expected=shard.sha256, found=sha256_of(path))

    def __reduce__(self) -> tuple[type["ShardSet"], tuple[Path, ShardCache | None]]:
        return ShardSet, (self.folder, self.cache)

    def __len__(self) -> int:
        return len(self.index.samples)

    @property
    def entries(self) -> Sequence[SampleEntry]:
        return self.index.samples

    @property
    def sources(self) -> Mapping[str, SourceTotals]:
        """What the set holds of each source, by name."""
        return self.index.totals

    def sample(self, position: int, places: Sequence[int] | None = None) -> Sample:
        """The sample at `position` with its frames at `places`, or all; raw ones are a read-only view of the file.

        Raises:
            SampleCorrupt: names shard, key and reason.
        """
        if self.index.latents is not None:
            raise ValueError(f"{self.folder} holds latents and no pixels; use the set they were encoded from")
        with self._open(position) as (mapped, entry, facts):
            return _sample(entry.key, _frames(mapped, entry, places), facts)

    def latents(self, position: int, places: Sequence[int]) -> LatentSample:
        """The sample at `position` of a set of latents, with its frames at `places`.

        Raises:
            SampleCorrupt: names shard, key and reason.
        """
        assert self.index.latents is not None, "asked of a set of pixels"
        with self._open(position) as (mapped, entry, facts):
            stored = _array(mapped, entry, np.dtype(self.index.latents.dtype), ndim=4)
            return _latent_sample(entry.key, stored[list(places)], facts)

    def stored(self, position: int) -> tuple[dict[str, JsonValue], bytes]:
        """The facts and the clip's bytes of a sample, as they are stored; of a set of any kind since version 2.

        Raises:
            SampleCorrupt: names shard, key and reason.
        """
        with self._open(position) as (mapped, entry, facts):
            if entry.size is None:
                raise ValueError("a set of version 1 does not say where its clips end")
            return facts, mapped[entry.offset : entry.offset + entry.size]

    @contextmanager
    def _open(self, position: int) -> Generator[tuple[mmap.mmap, SampleEntry, dict[str, JsonValue]]]:
        """A sample's mapped shard, its entry and its facts, its bytes checked; damage met inside is told as such."""
        entry = self.index.samples[position]
        mapped = self._mapped(entry.shard)
        try:
            if not self._checked[position]:
                _check_bytes(mapped, entry)
                self._checked[position] = 1
            facts = json.loads(mapped[entry.json_offset : entry.json_offset + entry.json_size])
            yield mapped, entry, cast(dict[str, JsonValue], facts)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            path = self.folder / self.index.shards[entry.shard].name
            raise SampleCorrupt(
                f"{path}: sample '{entry.key}' is corrupt: {error or type(error).__name__}; copy the shard again or"
                " write the set anew"
            ) from error

    def still_caption(self, position: int) -> str | None:
        """What any single frame shows, if the sample says so; read from the shard only in a set of version 1."""
        if self.index.schema_version > 1:
            return self.index.samples[position].image_caption
        told = self.sample(position, ()).extra.get("image_caption")
        return told if isinstance(told, str) else None

    def verify(self) -> None:
        """Read every byte and compare the digests; `ShardCorrupt` names the first shard that differs."""
        for position, shard in enumerate(self.index.shards):
            with self._map(position) as mapped:
                found = hashlib.sha256(mapped).hexdigest()
            if found != shard.sha256:
                raise ShardCorrupt(self.folder / shard.name, expected=shard.sha256, found=found)

    def _map(self, position: int) -> mmap.mmap:
        shard = self.index.shards[position]
        path = self.folder / shard.name
        fetched = None if path.is_file() or self.cache is None else self.cache.open(shard.sha256, shard.size)
        with fetched or path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_index(folder: Path) -> ShardIndex:
    path = folder / INDEX
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a whole shard set: it has no {INDEX}; write the set (again)") from None
    try:
        return ShardIndex.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{path}: not a shard index of schema version 1 or {SCHEMA_VERSION}: {where} {first['msg']}; write the set"
            " with this version of the project"
        ) from None


def _check_bytes(mapped: mmap.mmap, entry: SampleEntry) -> None:
    """Against the checksum, where the index has one: a decoder would conceal damage."""
    if entry.crc32 is None or entry.size is None:
        return
    facts = mapped[entry.json_offset : entry.json_offset + entry.json_size]
    if checksum(facts, memoryview(mapped)[entry.offset : entry.offset + entry.size]) != entry.crc32:
        raise ValueError("its bytes are not those that were written")


def checksum(facts: bytes, clip: bytes | memoryview) -> int:
    """CRC-32 of a sample's two members."""
    return zlib.crc32(clip, zlib.crc32(facts))


def _frames(mapped: mmap.mmap, entry: SampleEntry, places: Sequence[int] | None) -> npt.NDArray[np.uint8]:
    if entry.encoding == "mp4":
        assert entry.size is not None, "the index is of a version that encodes"
        return decode(
            mapped[entry.offset : entry.offset + entry.size], range(entry.num_frames) if places is None else places
        )
    frames = _array(mapped, entry, np.dtype(np.uint8), ndim=4)
    if frames.shape[-1] != 3:
        raise ValueError(f"frames have {frames.shape[-1]} channels, not 3")
    return frames if places is None else frames[list(places)]


def _array(mapped: mmap.mmap, entry: SampleEntry, dtype: np.dtype[Any], ndim: int) -> npt.NDArray[Any]:
    """The clip's .npy member as a read-only view of the file."""
    header_end = entry.offset + 10 + int.from_bytes(mapped[entry.offset + 8 : entry.offset + 10], "little")
    shape = _array_shape(mapped[entry.offset : header_end], dtype, ndim)
    if shape[0] != entry.num_frames:
        raise ValueError(f"it holds {shape[0]} frames where the index says {entry.num_frames}")
    return np.frombuffer(mapped, dtype, int(np.prod(shape)), header_end).reshape(shape)


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


def _latent_sample(key: str, latents: npt.NDArray[np.floating], facts: dict[str, JsonValue]) -> LatentSample:
    return LatentSample(
        key=key,
        latents=latents,
        caption=str(facts["caption"]),
        original_height=int(cast(int, facts["original_height"])),
        original_width=int(cast(int, facts["original_width"])),
        top=float(cast(float, facts[TOP])),
        left=float(cast(float, facts[LEFT])),
        extra=facts,
    )


@lru_cache(maxsize=256)
def _array_shape(header: bytes, wanted: np.dtype[Any], ndim: int) -> tuple[int, ...]:
    """Shape in the header of an .npy file of this type and number of axes; ValueError for any other."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype != wanted or len(shape) != ndim:
        raise ValueError(f"its array is {dtype} {shape}, not {wanted} with {ndim} axes")
    return shape


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
