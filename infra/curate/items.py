"""Items: the videos of a folder, an S3 prefix or a manifest, cut into units of work.

It owns what an item is, where its words and licence come from, and how its bytes get to this machine; it knows nothing
of what is done with them.
"""

import hashlib
import json
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from infra.curate.recipe import SOURCE, OriginConfig
from infra.store.artifacts import ArtifactNotFound
from infra.store.s3_client import S3Access, S3Client
from infra.store.s3_parts import pieces
from model.config import Config
from model.data.clips import SceneCaption, Text
from model.data.scenes import VIDEO_SUFFIXES

SIDECAR = ".json"


class About(Config):
    """What is told of a video, by `VIDEO.json` beside it or by its line in the manifest; nothing must be."""

    caption: Text | None = None
    image_caption: Text | None = None
    """What any single frame shows, without motion."""
    licence: Text | None = None
    credit: Text | None = None
    source: Annotated[str, Field(pattern=SOURCE)] | None = None
    scenes: tuple[SceneCaption, ...] = ()

    def caption_at(self, seconds: float) -> str | None:
        """The caption of the stretch that holds this moment, or of the whole video."""
        fitting = (part.caption for part in self.scenes if part.start_seconds <= seconds < part.end_seconds)
        return next(fitting, self.caption)

    def completed(self, origin: OriginConfig) -> "About":
        """With what the recipe says of items that are silent."""
        told = self.model_dump(exclude_none=True)
        return About.model_validate({**origin.model_dump(exclude_none=True), **told})


class ManifestLine(About):
    """A line of a manifest (JSON Lines)."""

    video: Text
    """A path, relative to the manifest's folder unless absolute, or `s3://bucket/key`."""


class Item(Config):
    """A video to curate."""

    place: str
    """An absolute path or an S3 URL."""
    version: str
    """Changes when the bytes do: size and time of a file, ETag of an object."""
    about: About | None = None
    """From the manifest; None looks for the sidecar."""

    @property
    def key(self) -> str:
        """Names the item in keys of samples and in folders: unique, safe and readable."""
        name = re.sub(r"[^A-Za-z0-9]+", "_", Path(urlsplit(self.place).path).stem)[:40].strip("_") or "video"
        return f"{name}-{hashlib.sha256(self.place.encode()).hexdigest()[:10]}"


class Unit(Config):
    """Items that one process works through."""

    number: int
    items: tuple[Item, ...]

    @property
    def folder(self) -> str:
        return f"unit-{self.number:05d}"


def list_items(where: str, access: S3Access | None = None) -> list[Item]:
    """The videos of a folder with its sub-folders, of `s3://bucket/prefix`, or of a manifest ending in .jsonl.

    Files of other kinds are left out; what only looks like a video is found out later and counted. ValueError if none.
    """
    if where.startswith("s3://"):
        items = list(_listed_on_s3(where, access))
    elif where.endswith(".jsonl"):
        items = list(_listed_in_manifest(Path(where), access))
    elif Path(where).is_dir():
        paths = (path for path in sorted(Path(where).absolute().rglob("*")) if path.is_file())
        items = [_local(path) for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    else:
        raise ValueError(f"{where}: neither a folder, nor s3://bucket/prefix, nor a manifest that ends in .jsonl")
    if not items:
        raise ValueError(f"{where} holds no video; files must end in one of {' '.join(VIDEO_SUFFIXES)}")
    return items


def units_of(items: Sequence[Item], size: int) -> list[Unit]:
    """Consecutive items; one that is listed twice is worked on once."""
    once = list({item.place: item for item in items}.values())
    starts = range(0, len(once), size)
    return [Unit(number=number, items=tuple(once[start : start + size])) for number, start in enumerate(starts)]


@contextmanager
def fetched(item: Item, access: S3Access | None = None) -> Generator[tuple[Path, About]]:
    """The item's file on this machine for as long as the context lasts, and what is told of it.

    Raises:
        FileNotFoundError: it is gone since it was listed.
        ConnectionError: the network is away; nobody's fault.
    """
    if not item.place.startswith("s3://"):
        path = Path(item.place)
        sidecar = path.with_name(path.name + SIDECAR)
        told = sidecar.read_bytes() if item.about is None and sidecar.is_file() else None
        yield path, item.about or _about(told, str(sidecar))
        return
    client, key = _client(item.place, access)
    with TemporaryDirectory(prefix="curate-") as scratch:
        path = Path(scratch) / Path(key).name
        try:
            with path.open("wb") as file:
                file.writelines(pieces(client, key, key))
        except ArtifactNotFound as error:
            raise FileNotFoundError(str(error)) from error
        yield path, item.about or _sidecar_on_s3(client, key + SIDECAR)


def _local(path: Path, about: About | None = None) -> Item:
    known = path.stat()
    return Item(place=str(path), version=f"{known.st_size}-{known.st_mtime_ns}", about=about)


def _listed_on_s3(url: str, access: S3Access | None) -> Iterator[Item]:
    client, prefix = _client(url, access)
    for page in client.pages("", "list_objects_v2", Prefix=prefix):
        for told in page.get("Contents", []):
            if Path(told["Key"]).suffix.lower() in VIDEO_SUFFIXES:
                yield Item(place=f"s3://{client.bucket}/{told['Key']}", version=str(told["ETag"]).strip('"'))


def _listed_in_manifest(path: Path, access: S3Access | None) -> Iterator[Item]:
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest")
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = ManifestLine.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{path}:{number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        about = About.model_validate(line.model_dump(exclude={"video"}))
        if line.video.startswith("s3://"):
            client, key = _client(line.video, access)
            tag = client.asked(key, "head_object", Key=key)["ETag"]
            yield Item(place=line.video, version=str(tag).strip('"'), about=about)
        else:
            video = (path.parent / line.video).absolute()
            yield _local(video, about) if video.is_file() else Item(place=str(video), version="missing", about=about)


def _client(url: str, access: S3Access | None) -> tuple[S3Client, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return S3Client(bucket, f"s3://{bucket}", access or S3Access()), key


def _sidecar_on_s3(client: S3Client, key: str) -> About:
    try:
        return _about(b"".join(pieces(client, key, key)), key)
    except ArtifactNotFound:
        return About()


def _about(told: bytes | None, place: str) -> About:
    if told is None:
        return About()
    try:
        return About.model_validate(json.loads(told))
    except (ValidationError, ValueError) as error:
        raise ValueError(f"{place} is not a sidecar: {str(error).splitlines()[0]}") from None
