"""Timing caches in the artifact store: what builders measured, by library, version and GPU.

It owns `timing-caches/`; it knows nothing of what is in one. A cache only saves time, so a lost one is no fault.
"""

import hashlib
import re
from collections.abc import Callable

from infra.store.artifacts import AlreadyExists, ArtifactNotFound, ArtifactStore, Conflict, Versioned

Merge = Callable[[bytes, bytes], bytes]


class TimingCaches:
    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def read(self, library: str, version: str, gpu: str) -> bytes:
        """What was measured so far; empty if nothing was."""
        standing = self._standing(_place(library, version, gpu))
        return b"" if standing is None else standing.data

    def add(self, library: str, version: str, gpu: str, measured: bytes, merge: Merge) -> str:
        """Keep what a build measured beside what others did meanwhile; the sha256 of what stands then."""
        place = _place(library, version, gpu)
        while True:
            standing = self._standing(place)
            data = measured if standing is None else merge(standing.data, measured)
            try:
                if standing is None:
                    self._store.create(place, data)
                elif data != standing.data:
                    self._store.swap(place, data, standing.version)
            except (AlreadyExists, Conflict):
                continue  # another builder was quicker: merge with what it wrote
            return hashlib.sha256(data).hexdigest()

    def _standing(self, place: str) -> Versioned | None:
        try:
            return self._store.read(place)
        except ArtifactNotFound:
            return None


def _place(library: str, version: str, gpu: str) -> str:
    return f"timing-caches/{library}/{version}/{re.sub(r'[^A-Za-z0-9._-]+', '-', gpu).strip('-.')}"
