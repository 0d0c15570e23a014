"""A store in a folder.

It owns how a file system keeps the promise of `infra.store.artifacts`: links, renames, a lock and a counter; it knows
nothing of S3, nor of what is stored.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from infra.store.artifacts import (
    AlreadyExists,
    ArtifactNotFound,
    ArtifactStore,
    Conflict,
    Source,
    StoreFull,
    StoreRefused,
    Versioned,
    check_key,
    check_prefix,
)

_PIECE = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FolderStore(ArtifactStore):
    """A store in a folder of a POSIX file system with hard links; every write is on disk before it is reported."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = self.root.as_uri()
        self._temporary = self.root / ".tmp"
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreRefused(
                f"{root} cannot hold a store: {error.strerror}; name a folder one can write to"
            ) from None

    def create(self, key: str, data: bytes) -> str:
        target = self.root / check_key(key)
        version = self._version(key, data)
        try:
            with self._placed(target, _link) as file:
                file.write(data)
        except (FileExistsError, NotADirectoryError):
            raise AlreadyExists(f"{self.url}/{key} already exists, or is a folder of others") from None
        return version

    def read(self, key: str) -> Versioned:
        check_key(key)
        with self._locked(fcntl.LOCK_SH):
            return self._read(key)

    def swap(self, key: str, data: bytes, expected: str) -> str:
        check_key(key)
        with self._locked(fcntl.LOCK_EX):
            found = self._read(key).version
            if found != expected:
                raise Conflict(f"{self.url}/{key} is at version {found}, not {expected}: read it again")
            # The counter goes first: a crash in between costs a rival one more read and never hides a change.
            moves = self._count(key) + 1
            with self._placed(self._counter(key)) as file:
                file.write(str(moves).encode())
            with self._placed(self.root / key) as file:
                file.write(data)
            return self._version(key, data)

    def list(self, prefix: str = "") -> Sequence[str]:
        start = self.root / check_prefix(prefix).rpartition("/")[0]
        found: list[str] = []
        for folder, subfolders, names in os.walk(start):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            keys = [(Path(folder) / name).relative_to(self.root).as_posix() for name in names if name[0] != "."]
            found += [key for key in keys if key.startswith(prefix)]
        return sorted(found)

    def _read(self, key: str) -> Versioned:
        with self._present(key):
            data = (self.root / key).read_bytes()
            return Versioned(data, self._version(key, data))

    def _version(self, key: str, data: bytes) -> str:
        # The counter tells bytes that came back apart; the digest tells a file somebody edited by hand.
        return f"{self._count(key)}-{hashlib.sha256(data).hexdigest()}"

    def _counter(self, key: str) -> Path:
        return self.root / ".swaps" / key

    def _count(self, key: str) -> int:
        counter = self._counter(key)
        return int(counter.read_bytes()) if counter.exists() else 0

    def _size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def _upload(self, key: str, source: Source) -> None:
        sha256 = hashlib.sha256()
        with source.path.open("rb") as original, self._placed(self.root / key) as file:
            while piece := original.read(_PIECE):
                sha256.update(piece)
                file.write(piece)
            source.check(sha256.hexdigest())

    def _pieces(self, key: str) -> Iterator[bytes]:
        with self._present(key):
            file = (self.root / key).open("rb")
        with file:
            while piece := file.read(_PIECE):
                yield piece

    def _discard(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def clear_unfinished(self, older_than: timedelta) -> int:
        oldest = time.time() - older_than.total_seconds()
        left = [path for path in self._temporary.iterdir() if path.stat().st_mtime < oldest]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    @contextmanager
    def _present(self, key: str) -> Generator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ArtifactNotFound(f"{self.url}/{key}: no such object") from None

    @contextmanager
    def _placed(self, target: Path, place: Callable[[Path, Path], None] = os.replace) -> Generator[BinaryIO]:
        """A file to write; it gets the target's name once all of it is on disk."""
        temporary = self._temporary / uuid4().hex
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _make_folder(target.parent)
            place(temporary, target)
            _sync_folder(target.parent)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            key = target.relative_to(self.root)
            raise StoreFull(f"{self.url}/{key}: {error.strerror}; free some space there, or raise its limit") from error
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, kind: int) -> Generator[None]:
        # flock and not lockf: it belongs to the open file, so threads of one process exclude each other too.
        lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, kind)
            yield
        finally:
            os.close(lock)


def _link(temporary: Path, target: Path) -> None:
    """Unlike a rename, a link fails when the name is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # A network file system sends a link again whose answer was lost, and meets the first one.
        if not os.path.samefile(temporary, target):
            raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """A folder whose name, and whose parents' names, are on disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)
