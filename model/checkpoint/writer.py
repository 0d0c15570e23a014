"""Writing checkpoints while training goes on: every rank its own pieces, made one checkpoint by rank 0.

It owns the snapshot, the thread and the order of a commit:

    each rank: its files, synced, then a note of them
    rank 0, once all notes are there: state.json and recipe.json, the manifest (made once), the folder's name, the
    pointer `latest`, then retention
    each rank, where there is a sink: its files there, then a note; rank 0: the manifest there, the pointer there

A process killed anywhere in it leaves the checkpoint before, or the new one. What it had begun bears the attempt's
name, is never looked at again, and is swept away by the next attempt. No thread calls a collective: they meet through
notes in the run folder, which all ranks see.
"""

import json
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint import durable, folder, rendezvous
from model.checkpoint.manifest import RECIPE, STATE, Entry, entry_of_bytes, name_of, write_manifest
from model.checkpoint.pieces import HostCopy, gap_in
from model.checkpoint.reader import file_of
from model.checkpoint.sink import CheckpointSink
from model.checkpoint.snapshot import Snapshot
from model.checkpoint.state import PARTS, RankState
from model.checkpoint.upload import Upload
from model.recipe import StageRecipe, dumps

logger = logging.getLogger(__name__)

PATIENCE = 1500.0
"""Seconds that ranks wait for the slowest one's files."""


@dataclass(slots=True, frozen=True)
class _Job:
    """What is written of a step: it changes no more, whatever training does."""

    name: str
    snapshot: Snapshot
    facts: str
    """JSON of the step, the inputs and the loader's state."""
    recipe: StageRecipe


class CheckpointWriter:
    """One rank's writer. Every rank makes one before the first step, and gives it the same steps to save.

    That order matters: rank 0 sweeps the run folder as it makes its own, and a step's collectives keep any other rank
    from saving before that.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        rank: int = 0,
        world_size: int = 1,
        sink: CheckpointSink | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.root = root
        self.keep = keep
        self.rank = rank
        self.world_size = world_size
        self.patience = patience
        self._upload = None if sink is None else Upload(root, sink, rank=rank, world_size=world_size, patience=patience)
        self._attempt = folder.begin_attempt(root) if rank == 0 else ""
        self._memory: dict[str, HostCopy] = {}
        self._copying: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: Path | None = None

    def save(self, state: RankState) -> float:
        """Begin to write a checkpoint; the seconds that training stood still for it.

        That is one copy to host memory and, if the checkpoint before is still being written, the rest of that.
        """
        return self.begin(state) + self.settle()

    def begin(self, state: RankState) -> float:
        """As `save`, but the copy runs beside what follows, until `settle`. The state must not change before that."""
        began = time.perf_counter()
        self.wait()
        self._check_turn(state)
        facts = json.dumps({"step": state.step, "inputs": dict(state.inputs), "loader": dict(state.loader)})
        job = _Job(name_of(state.step), Snapshot(state), facts, state.recipe)
        self._copying = job.snapshot
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        return time.perf_counter() - began

    def settle(self) -> float:
        """Wait for the copy that `begin` began, if any, before the state changes; the seconds that took."""
        if self._copying is None:
            return 0.0
        began = time.perf_counter()
        self._copying.settle()
        self._copying = None
        self.check()
        return time.perf_counter() - began

    @property
    def last(self) -> Path | None:
        """The newest durable checkpoint that this writer saved."""
        return self._last

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did; cheap."""
        if self._error is not None:
            raise self._error

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path | None:
        """Once nothing is being written: the checkpoint saved last, durable; None if this writer saved none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
        return self._last

    def close(self) -> None:
        """Finish what is being written and give the memory back."""
        self.wait()
        self._memory.clear()

    def _check_turn(self, state: RankState) -> None:
        if (state.rank, state.world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"the state is of rank {state.rank} of {state.world_size}, the writer of rank {self.rank} of"
                f" {self.world_size}"
            )
        standing = folder.latest(self.root) if self.rank == 0 else None
        if standing is not None and standing.name == name_of(state.step):
            raise ValueError(f"{standing} is the latest checkpoint already; a step is saved once")

    def _run(self, job: _Job) -> None:
        """The thread: what fails here is raised in training, by `check`."""
        try:
            job.snapshot.take(self._memory)
            self._write(job)
        except BaseException as error:
            error.add_note(f"while writing checkpoint {job.name} in {self.root}")
            self._error = error

    def _write(self, job: _Job) -> None:
        temporary = self.root / f".{job.name}.{self._attempt_name()}.tmp"
        temporary.mkdir(exist_ok=True)
        files: dict[str, Entry] = {}
        for part, copy in self._memory.items():
            file = file_of(part, self.rank, self.world_size)
            files[file] = copy.write(temporary / file)
        durable.sync(temporary)
        note = {"files": files, "tensors": job.snapshot.index, "facts": json.loads(job.facts)}
        rendezvous.leave(temporary, self.rank, note)
        if self.rank == 0:
            self._commit(temporary, job)
        elif not rendezvous.wait_until(lambda: not temporary.exists(), self.patience):
            raise TimeoutError(f"rank 0 did not commit {temporary} within {self.patience:g} s; see its log")
        self._last = self.root / job.name
        if self._upload is not None:
            self._upload.send(self._last, files, self._attempt_name())
        if self.rank == 0:
            kept = folder.retain(self.root, self._last, self.keep)
            if self._upload is not None:
                self._upload.retain(kept)

    def _commit(self, temporary: Path, job: _Job) -> None:
        """Rank 0: make all ranks' files one checkpoint."""
        notes = rendezvous.collect(temporary, self.world_size, self.patience)
        state = {**notes[0]["facts"], "world_size": self.world_size, "tensors": _joined(notes)}
        files: dict[str, Entry] = {name: entry for note in notes for name, entry in note["files"].items()}
        for name, data in ((STATE, json.dumps(state, sort_keys=True).encode()), (RECIPE, dumps(job.recipe).encode())):
            durable.write(temporary / name, data)
            files[name] = entry_of_bytes(data)
        for rank in range(self.world_size):
            (temporary / rendezvous.note_of(rank)).unlink()
        write_manifest(temporary, files)
        if (self.root / folder.ATTEMPT).read_text() != self._attempt:
            raise RuntimeError(f"another attempt writes in {self.root} by now; this one's checkpoint is left out")
        folder.publish(self.root, temporary, job.name)
        logger.info("saved %s", self.root / job.name)

    def _attempt_name(self) -> str:
        if not self._attempt:
            path = self.root / folder.ATTEMPT
            if not path.exists():
                raise ValueError(f"{path} is missing: rank 0 has made no writer, or does not see this folder")
            self._attempt = path.read_text()
        return self._attempt


def _joined(notes: list[Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """All ranks' pieces as whole tensors: shape and runs by part and name."""
    tensors: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in PARTS}
    for rank, note in enumerate(notes):
        for fact in ("step", "inputs"):
            mine, first = note["facts"][fact], notes[0]["facts"][fact]
            if mine != first:
                raise ValueError(f"rank {rank} saves {fact} {mine}, rank 0 {first}")
        for part, pieces in note["tensors"].items():
            for name, (shape, start, stop) in pieces.items():
                tensor = tensors[part].setdefault(name, {"shape": shape, "runs": []})
                if tensor["shape"] != shape:
                    raise ValueError(f"{part} '{name}' has shape {shape} on rank {rank}, elsewhere {tensor['shape']}")
                tensor["runs"].append((rank, start, stop))
    for part, whole in tensors.items():
        for name, tensor in whole.items():
            gap = gap_in(tensor["shape"], tensor["runs"])
            if gap is not None:
                raise ValueError(f"{part} '{name}' cannot be put together again: {gap}")
    return tensors
