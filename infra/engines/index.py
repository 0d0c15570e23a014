"""The index of engines by what they were made from, so that identical inputs reuse what is stored.

It owns `engine-index/` in an artifact store; it knows nothing of what inputs are. An entry is a hint and is never
trusted: what it names must say itself that it was made from these inputs, and its signature is checked where it is
loaded. So the garbage collector need not know of entries either: one whose engine is gone is found out and replaced.
"""

import json
import logging

from infra.engines.provenance import keys_of
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.store.artifacts import AlreadyExists, ArtifactCorrupt, ArtifactNotFound, Conflict, blob_key

logger = logging.getLogger(__name__)


class EngineIndex:
    """Manifests by the digest of their inputs."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def find(self, key: str) -> Manifest | None:
        """The engine made from these inputs, if it is stored and whole."""
        try:
            entry = json.loads(self._registry.store.read(_place(key)).data)
            return self._manifest(key, str(entry["manifest"]))
        except ArtifactNotFound:
            return None
        except (ArtifactCorrupt, ValueError, LookupError, TypeError) as error:
            logger.warning("engine index entry %s is of no use, the engine is made again: %s", key[:12], error)
            return None

    def remember(self, key: str, made: Manifest) -> Manifest:
        """Note what was made, and say what to use: of two that made the same at once, both use the one noted first."""
        store, data = self._registry.store, json.dumps({"manifest": made.digest}).encode()
        while True:
            try:
                store.create(_place(key), data)
                return made
            except AlreadyExists:
                standing = self.find(key)
            if standing is not None:
                return standing
            try:
                store.swap(_place(key), data, store.read(_place(key)).version)
                return made
            except (Conflict, ArtifactNotFound):
                continue  # somebody else mended it meanwhile: look again

    def _manifest(self, key: str, digest: str) -> Manifest | None:
        manifest = self._registry.resolve(digest)
        if key not in keys_of(manifest):
            raise ArtifactCorrupt(f"manifest {digest[:12]} does not say that it was made from inputs {key[:12]}")
        store = self._registry.store
        missing = [name for name, blob in manifest.files.items() if not store.exists(blob_key(blob.digest))]
        if missing:
            raise ArtifactNotFound(f"files {missing} of {digest[:12]} are gone")
        return manifest


def _place(key: str) -> str:
    return f"engine-index/{key}.json"
