"""What an artifact store is: small named objects with conditional writes, and blobs named by their sha256.

It owns the promise every store keeps (a write is whole or invisible, of two rivals one wins), the names that are
allowed, and the errors; it knows nothing of folders, of S3, or of what is stored.
"""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

# A part that begins with a dot belongs to the store itself (locks, counters, half-written files) or leads out of it.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]*(/[A-Za-z0-9_][A-Za-z0-9._+=@-]*)*")
_KEY_LIMIT = 512
_DIGEST = re.compile(r"[0-9a-f]{64}")


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

    def exists(self, key: str) -> bool:
        return self._size(check_key(key)) is not None

    def put_file(self, path: Path, known: Blob | None = None) -> Blob:
        """Store a file under its digest; a blob already there in full length is not sent again.

        Who has hashed the bytes as they were written says so by `known`, and they are not read twice.
        """
        before = path.stat()
        blob = known or blob_of(path)
        if before.st_size != blob.size:
            raise ValueError(f"{path} has {before.st_size} bytes where {blob.size} were written; write it again")
        key = blob_key(blob.digest)
        if self._size(key) == blob.size:
            return blob
        self._upload(key, path)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            self._discard(key)
            raise ValueError(f"{path} changed while it was being stored; store it again once nothing writes to it")
        return blob

    def delete(self, key: str) -> None:
        """Remove an object for good; one that is not there is no error. Only for who knows that nobody needs it."""
        self._discard(check_key(key))

    def fetch_file(self, digest: str, to: Path) -> None:
        """Copy a blob to `to`, which appears only whole and only if the bytes have the digest."""
        key = blob_key(digest)
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{uuid4().hex}.part")
        try:
            self._download(key, temporary)
            found = blob_of(temporary).digest
            if found != digest:
                raise ArtifactCorrupt(
                    f"{self.url}/{key} is corrupt: expected sha256 {digest}, found {found}; delete that object and"
                    " publish its file again"
                )
            os.replace(temporary, to)
        finally:
            temporary.unlink(missing_ok=True)

    @abstractmethod
    def _size(self, key: str) -> int | None: ...

    @abstractmethod
    def _upload(self, key: str, path: Path) -> None: ...

    @abstractmethod
    def _download(self, key: str, path: Path) -> None: ...

    @abstractmethod
    def _discard(self, key: str) -> None: ...
