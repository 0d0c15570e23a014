"""The shard cache: shards of a set that lies in a store, kept on this machine up to a limit.

It owns which shards stay; it knows nothing of what is in them or of what kind the store is, and relies on the store
handing out whole files of the wanted sha256 only.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

logger = logging.getLogger(__name__)

_ABANDONED_SECONDS = 3600.0
"""A part of a download that is older is of a process that was killed."""


class ShardSource(Protocol):
    """A store of files by content; `ArtifactStore` is one."""

    def fetch_file(self, digest: str, to: Path) -> None:
        """Copy the file with this sha256 to `to`, which appears only whole and only if its bytes have the digest."""
        ...


@dataclass(frozen=True)
class ShardCache:
    """Shards in `folder`, fetched when first wanted, those unused for longest given up for new ones.

    Several processes may share a folder: a shard is fetched once, and one given up stays readable where it is open.
    """

    connect: Callable[[], ShardSource]
    """Called in each process that fetches, so it must be picklable: `partial(open_store, url)`."""
    folder: Path
    max_bytes: int
    """Limit of what stays; shards being fetched at this moment come on top."""

    def open(self, digest: str, size: int) -> BinaryIO:
        """A whole shard; ValueError if it alone is above the limit."""
        if size > self.max_bytes:
            raise ValueError(f"{self.folder}: a shard of {size} bytes exceeds the cache's limit of {self.max_bytes}")
        path = self.folder / f"{digest}.tar"
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                self._fetch(digest, path)
                continue
            _touch(file.fileno())
            return file

    def _fetch(self, digest: str, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(digest):
            if not path.exists():
                began = time.monotonic()
                self.connect().fetch_file(digest, path)
                logger.info("fetched shard %s in %.1f s", digest[:16], time.monotonic() - began)
        with self._locked("room"):
            with suppress(FileNotFoundError):  # given up already, by another process
                _touch(path)
            self._make_room()

    def _make_room(self) -> None:
        left = self.max_bytes
        for shard in sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            left -= shard.stat().st_size
            if left < 0:
                shard.unlink()
        for part in self.folder.glob(".*.part"):
            if part.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                part.unlink()

    @contextmanager
    def _locked(self, name: str) -> Generator[None]:
        with (self.folder / f".lock-{name}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _touch(file: Path | int) -> None:
    """Say that it is used now; the file system's own clock is too coarse to tell two uses apart."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))
