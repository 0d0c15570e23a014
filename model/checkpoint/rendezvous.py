"""How the ranks of a run meet without a collective: each leaves a note in a folder all of them see.

It owns the notes and the waiting; it does not know what they say. A thread may not call a collective while the training
thread does, so the checkpoint's threads meet here.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.checkpoint import durable

FIRST_LOOK = 0.005
LONGEST_PAUSE = 0.5
"""Seconds between two looks; each pause is half as long again as the one before."""


def note_of(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def leave(folder: Path, rank: int, note: object) -> None:
    """Put a rank's note where the others find it, whole."""
    durable.replace(folder / note_of(rank), json.dumps(note).encode())


def collect(folder: Path, world_size: int, patience: float) -> list[Any]:
    """Every rank's note, by rank."""
    notes = [folder / note_of(rank) for rank in range(world_size)]

    def all_there() -> bool:
        return all(note.exists() for note in notes)

    if not wait_until(all_there, patience):
        missing = [rank for rank, note in enumerate(notes) if not note.exists()]
        raise TimeoutError(
            f"rank {', '.join(map(str, missing))} of {world_size} left nothing in {folder} within {patience:g} s; see"
            " that rank's log, and whether all ranks see one run folder; the checkpoint before is untouched"
        )
    return [json.loads(note.read_bytes()) for note in notes]


def wait_until(true: Callable[[], bool], patience: float) -> bool:
    """Whether it became true in time."""
    deadline, pause = time.monotonic() + patience, FIRST_LOOK
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
    return True
