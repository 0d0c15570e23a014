"""What an artifact store is: small named objects with conditional writes, and blobs named by their sha256.

It owns the promise every store keeps (a write is whole or invisible, of two rivals one wins), the names that are
allowed, and the errors; it knows nothing of folders, of S3, or of what is stored.
"""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

# A part that begins with a dot belongs to the store itself (locks, counters, half-written files) or leads out of it.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]*(/[A-Za-z0-9_][A-Za-z0-9._+=@-]*)*")
_KEY_LIMIT = 512
_DIGEST = re.compile(r"[0-9a-f]{64}")
FILES_AT_ONCE = 4
K = TypeVar("K")
T = TypeVar("T")


class ArtifactNotFound(ValueError):
    """Nothing is stored under that name."""


class ArtifactCorrupt(ValueError):
    """What is stored is not what its digest says."""


class AlreadyExists(ValueError):
    """A create met an object of that name; the object is untouched."""


class Conflict(ValueError):
    """A swap met another version than the expected one; the object is untouched."""


class StoreRefused(ValueError):
    """The place cannot be a store: no bucket, no right to it, or no conditional writes."""


class StoreFull(ConnectionError):
    """There is no space for the write, of which nothing is visible."""


class OutcomeUnknown(ConnectionError):
    """A write was sent, its answer was lost, and others have written since: whether it took place, nobody can say.

    Who made the write looks at what it would have led to before making it again.
    """


@dataclass(frozen=True, slots=True)
class Versioned:
    """An object's bytes and the version a swap must name to replace them."""

    data: bytes
    version: str


@dataclass(frozen=True, slots=True)
class Blob:
    """A file's content: its sha256 in hex and its length in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Source:
    """A file to store, and what it was when its digest was taken."""

    path: Path
    blob: Blob
    modified: int
    """Nanoseconds."""

    def check(self, digest: str | None = None) -> None:
        """Refuse a file that somebody writes; `digest` is of the bytes that were read, if they were hashed."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.blob.size, self.modified) or digest not in (None, self.blob.digest):
            raise ValueError(f"{self.path} changed while it was being stored; store it again once nothing writes to it")


def blob_of(path: Path) -> Blob:
    """Digest and size of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Blob(digest, file.tell())


def check_key(key: str) -> str:
    """The key itself, if it is one: names of letters, digits and `._+=@-` between slashes, none with a leading dot."""
    if not _KEY.fullmatch(key) or len(key) > _KEY_LIMIT:
        raise ValueError(
            f"{key!r} is not a store key: use at most {_KEY_LIMIT} letters, digits and ._+=@- between single slashes,"
            " no part of which begins with '.' or '-'"
        )
    return key


def check_prefix(prefix: str) -> str:
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def check_digest(digest: str) -> str:
    """The digest itself, if it is one."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a sha256 digest: 64 characters of 0-9a-f")
    return digest


def blob_key(digest: str) -> str:
    """Where a blob lies in every store."""
    return f"cas/sha256/{check_digest(digest)[:2]}/{digest}"


class ArtifactStore(ABC):
    """Create, read and swap small objects; put and fetch files by content.

    A version names bytes. On S3 it is the ETag, so bytes that return bring their version back: whoever swaps must
    write something new each time (a ref carries its generation).
    """

    url: str

    @abstractmethod
    def create(self, key: str, data: bytes) -> str:
        """Write a new object and return its version; `AlreadyExists` leaves the present one as it is."""

    @abstractmethod
    def read(self, key: str) -> Versioned:
        """An object and its version, or `ArtifactNotFound`."""

    @abstractmethod
    def swap(self, key: str, data: bytes, expected: str) -> str:
        """Replace the version `expected` and return the new one; `Conflict` if another stands there."""

    @abstractmethod
    def list(self, prefix: str = "") -> Sequence[str]:
        """Sorted keys that begin with `prefix`."""

    @abstractmethod
    def clear_unfinished(self, older_than: timedelta) -> int:
        """Remove what writers that were killed left half written, invisible but not without cost; how many."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None where there is none."""
        return self._size(check_key(key))

    def put_file(self, path: Path, known: Blob | None = None) -> Blob:
        """Store a file under its digest; a blob already there in full length is not sent again.

        Who has hashed the bytes as they were written says so by `known`, and they are not read twice.
        """
        before = path.stat()
        blob = known or blob_of(path)
        if before.st_size != blob.size:
            raise ValueError(f"{path} has {before.st_size} bytes where {blob.size} were written; write it again")
        key = blob_key(blob.digest)
        if self._size(key) != blob.size:
            self._upload(key, Source(path, blob, before.st_mtime_ns))
        return blob

    def put_files(self, paths: Mapping[str, Path]) -> dict[str, Blob]:
        """Store files, several at once, and say what each is, by name; of several failures the first is raised."""
        return all_of({name: partial(self.put_file, path) for name, path in paths.items()})

    def fetch_files(self, digests: Mapping[Path, str]) -> None:
        """Copy a blob to each path, several at once."""
        all_of({to: partial(self.fetch_file, digest, to) for to, digest in digests.items()})

    def delete(self, key: str) -> None:
        """Remove an object for good; one that is not there is no error. Only for who knows that nobody needs it."""
        self._discard(check_key(key))

    def measure(self, digest: str) -> Blob:
        """The digest and size of the bytes that are stored as the blob of that digest; equal digests prove it sound."""
        sha256, size = hashlib.sha256(), 0
        for piece in self._pieces(blob_key(digest)):
            sha256.update(piece)
            size += len(piece)
        return Blob(sha256.hexdigest(), size)

    def fetch_file(self, digest: str, to: Path) -> None:
        """Copy a blob to `to`, which appears only whole and only if the bytes have the digest."""
        key = blob_key(digest)
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{uuid4().hex}.part")
        sha256 = hashlib.sha256()
        try:
            with temporary.open("xb") as file:
                for piece in self._pieces(key):
                    sha256.update(piece)
                    file.write(piece)
            if sha256.hexdigest() != digest:
                raise ArtifactCorrupt(
                    f"{self.url}/{key} is corrupt: expected sha256 {digest}, found {sha256.hexdigest()}; delete that"
                    " object and publish its file again"
                )
            os.replace(temporary, to)
        finally:
            temporary.unlink(missing_ok=True)

    @abstractmethod
    def _size(self, key: str) -> int | None: ...

    @abstractmethod
    def _upload(self, key: str, source: Source) -> None:
        """Store a file where there is nothing, or a blob that was cut short; `source.check` comes before it is seen."""

    @abstractmethod
    def _pieces(self, key: str) -> Iterator[bytes]:
        """The bytes of an object in order, or `ArtifactNotFound` before the first."""

    @abstractmethod
    def _discard(self, key: str) -> None: ...


def all_of(calls: Mapping[K, Callable[[], T]]) -> dict[K, T]:
    """The result of each call, several at once; one that fails keeps those that have not begun from beginning."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        begun = {key: pool.submit(call) for key, call in calls.items()}
        try:
            return {key: future.result() for key, future in begun.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
