"""Checkpoints off this machine: each rank sends its own files, then rank 0 makes them one checkpoint there.

It owns the order and what a store that is away means: training goes on, since the run folder has the checkpoint, until
`PATIENT_SAVES` checkpoints in a row have not got there.
"""

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from model.checkpoint import rendezvous
from model.checkpoint.manifest import MANIFEST, RECIPE, STATE, Entry, Manifest
from model.checkpoint.sink import CheckpointSink

logger = logging.getLogger(__name__)

PATIENT_SAVES = 3


class Upload:
    """One rank's part of sending the checkpoints that stand in the run folder."""

    def __init__(self, root: Path, sink: CheckpointSink, *, rank: int, world_size: int, patience: float) -> None:
        self._root = root
        self._sink = sink
        self._rank = rank
        self._world_size = world_size
        self._patience = patience
        self._missed = 0
        """Checkpoints in a row that have not got there."""

    def send(self, checkpoint: Path, files: Mapping[str, Entry], attempt: str) -> None:
        """Send this rank's files; on rank 0, wait for the others' and move the sink's pointer."""
        meeting = self._root / f".{checkpoint.name}.{attempt}.sent.tmp"
        meeting.mkdir(exist_ok=True)
        rendezvous.leave(meeting, self._rank, _tried(lambda: self._put(checkpoint, files)))
        if self._rank == 0:
            problems: list[str | None] = rendezvous.collect(meeting, self._world_size, self._patience)
            shutil.rmtree(meeting)
            first = next((problem for problem in problems if problem), None)
            self._count(checkpoint, first or _tried(lambda: self._commit(checkpoint)))

    def retain(self, names: Collection[str]) -> None:
        """Rank 0: drop there what the run folder has dropped."""
        if not self._missed:
            problem = _tried(lambda: self._sink.retain(names))
            if problem:
                logger.warning("old checkpoints stay in the store for now: %s", problem)

    def _put(self, checkpoint: Path, files: Mapping[str, Entry]) -> None:
        for name, entry in files.items():
            self._sink.put(checkpoint / name, entry)

    def _commit(self, checkpoint: Path) -> None:
        files = Manifest.read(checkpoint).files
        self._put(checkpoint, {name: files[name] for name in (STATE, RECIPE)})
        manifest = (checkpoint / MANIFEST).read_bytes()
        self._sink.commit(checkpoint.name, manifest)
        self._sink.point(checkpoint.name, manifest)

    def _count(self, checkpoint: Path, problem: str | None) -> None:
        self._missed = self._missed + 1 if problem else 0
        if self._missed >= PATIENT_SAVES:
            raise ConnectionError(f"the last {self._missed} checkpoints are on this machine alone: {problem}")
        if problem:
            logger.error("checkpoint %s is on this machine alone: %s; the next one is tried again", checkpoint, problem)


def _tried(call: Callable[[], None]) -> str | None:
    """What a server that is away said, or None."""
    try:
        call()
    except ConnectionError as error:
        return str(error)
    return None
