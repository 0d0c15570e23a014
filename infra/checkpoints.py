"""A run's checkpoints in an artifact store: they outlive the machine, and a run goes on from them on an empty one.

It owns the layout `checkpoints/` in a store of the run's own, and its clearing up; when a checkpoint goes there, and
what it holds, is `model.checkpoint`'s. Published checkpoints are the registry's, elsewhere.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from infra.store.artifacts import (
    AlreadyExists,
    ArtifactCorrupt,
    ArtifactNotFound,
    ArtifactStore,
    Blob,
    Conflict,
    blob_key,
)
from infra.store.location import open_store
from infra.store.s3_client import S3Access
from model.checkpoint.manifest import Entry

FOLDER = "checkpoints/"
POINTER = "checkpoints/latest.json"


class StoreSink:
    """`model.checkpoint.sink.CheckpointSink` over a store that holds nothing else."""

    def __init__(self, store: ArtifactStore) -> None:
        if store.list("refs/"):
            raise ValueError(
                f"{store.url} holds a registry, whose files retention of checkpoints would delete; give the run's"
                " checkpoints a place of their own, such as a folder or prefix runs/NAME"
            )
        self.store = store
        self._seen: str | None = None
        """Version of the pointer as this process saw it last: a rival's move since then is a conflict."""

    @classmethod
    def open(cls, url: str, run: str, access: S3Access | None = None) -> "StoreSink":
        """The place of a run's checkpoints in the store at `url`."""
        return cls(open_store(f"{url.rstrip('/')}/runs/{run}", access))

    def put(self, path: Path, entry: Entry) -> None:
        self.store.put_file(path, Blob(entry["sha256"], entry["size"]))

    def commit(self, name: str, manifest: bytes) -> None:
        try:
            self.store.create(_key(name, manifest), manifest)
        except AlreadyExists:  # the key holds the digest: it is this very manifest, from an attempt that was killed
            return

    def point(self, name: str, manifest: bytes) -> None:
        standing = self._pointer()
        generation = 1 if standing is None else standing["generation"] + 1
        data = json.dumps({"generation": generation, "key": _key(name, manifest), "name": name}).encode()
        try:
            if self._seen is None:
                self._seen = self.store.create(POINTER, data)
            else:
                self._seen = self.store.swap(POINTER, data, self._seen)
        except (AlreadyExists, Conflict) as error:
            raise Conflict(
                f"{self.store.url}/{POINTER} was moved by another process, to {standing and standing['name']}: two runs"
                " save to one place; stop one of them or give it a place of its own"
            ) from error

    def latest(self) -> tuple[str, bytes] | None:
        try:
            self._seen = self.store.read(POINTER).version
        except ArtifactNotFound:
            return None
        standing = self._pointer()
        assert standing is not None, "a pointer is never taken away"
        return standing["name"], self.store.read(standing["key"]).data

    def retain(self, names: Collection[str]) -> None:
        """Blobs go before the manifest that names them, so that a kill in between leaves nothing unnamed behind."""
        standing = self._pointer()
        kept: set[str] = {POINTER}
        needed: set[str] = set()
        for key in self._manifests():
            if _name(key) in names or (standing is not None and key == standing["key"]):
                kept.add(key)
                needed |= {
                    blob_key(entry["sha256"]) for entry in json.loads(self.store.read(key).data)["files"].values()
                }
        for key in self.store.list("cas/"):
            if key not in needed:
                self.store.delete(key)
        for key in self._manifests():
            if key not in kept:
                self.store.delete(key)

    def fetch(self, entry: Entry, to: Path) -> None:
        self.store.fetch_file(entry["sha256"], to)

    def _pointer(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.store.read(POINTER).data)
        except ArtifactNotFound:
            return None
        except ValueError as error:
            raise ArtifactCorrupt(f"{self.store.url}/{POINTER} is not JSON: {error}") from None

    def _manifests(self) -> Iterator[str]:
        return (key for key in self.store.list(FOLDER) if key != POINTER)


def _key(name: str, manifest: bytes) -> str:
    return f"{FOLDER}{name}.{json.loads(manifest)['sha256'][:16]}.json"


def _name(key: str) -> str:
    return key.removeprefix(FOLDER).partition(".")[0]
