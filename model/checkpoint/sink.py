"""Where checkpoints also go, off this machine, and how a run comes back from there.

It owns what a run asks of such a place and the way back; `infra.checkpoints` fills it with an artifact store.
"""

import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from model.checkpoint import durable, folder
from model.checkpoint.manifest import MANIFEST, Entry, Manifest, step_of, verify

logger = logging.getLogger(__name__)


class CheckpointSink(Protocol):
    """A place for one run's checkpoints: files by digest, then a manifest that is made once, then the pointer.

    A server that is away is a ConnectionError; anything else it raises ends the run.
    """

    def put(self, path: Path, entry: Entry) -> None:
        """Store a file under its digest."""
        ...

    def commit(self, name: str, manifest: bytes) -> None:
        """Store the manifest of a checkpoint whose files are all there; the same again changes nothing."""
        ...

    def point(self, name: str, manifest: bytes) -> None:
        """Make this checkpoint the latest, unless another process has moved the pointer since `latest` was read."""
        ...

    def retain(self, names: Collection[str]) -> None:
        """Drop all checkpoints but these and the latest, and every file that none of them has."""
        ...

    def latest(self) -> tuple[str, bytes] | None:
        """Name and manifest of the checkpoint the pointer names."""
        ...

    def fetch(self, entry: Entry, to: Path) -> None:
        """Copy the file of that digest to `to`, verified."""
        ...


def restore(root: Path, sink: CheckpointSink) -> Path | None:
    """The run's newest checkpoint, fetched into `root` where the sink's is newer than what lies there.

    Called by one process before any rank looks at `root`.
    """
    here, there = folder.latest(root), sink.latest()
    if there is None or (here is not None and (step_of(here.name) or 0) >= (step_of(there[0]) or 0)):
        return here
    name, manifest = there
    final, temporary = root / name, root / f".{name}.fetched.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    durable.write(temporary / MANIFEST, manifest)
    for file, entry in Manifest.read(temporary).files.items():
        sink.fetch(entry, temporary / file)
    verify(temporary)
    folder.publish(root, temporary, name)
    logger.info("fetched %s", final)
    return final
