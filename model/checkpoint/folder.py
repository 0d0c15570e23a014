"""A run's folder of checkpoints: which is the latest, how one appears and goes; and weights by name from any of them.

A checkpoint appears by one rename and becomes the latest by one replace. It knows nothing of ranks, stores or
promotion. Nothing is pickled, so that reading a checkpoint can run no code.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from model.checkpoint import durable
from model.checkpoint.manifest import (
    LATEST,
    RECIPE,
    CheckpointCorrupt,
    Manifest,
    checkpoints,
    digest_of,
    entry_of,
    step_of,
    verify,
    way_out,
    write_manifest,
)
from model.checkpoint.reader import Reader
from model.checkpoint.state import Part, random_state, restore_random
from model.recipe import StageRecipe, dumps

__all__ = [
    "CheckpointCorrupt",
    "Reader",
    "digest_of",
    "latest",
    "load_weights",
    "random_state",
    "restore_random",
    "save_weights",
    "verify",
]

ATTEMPT = ".attempt"
"""File that holds the name of the attempt that may write; what an earlier one still writes leads nowhere."""


def save_weights(folder: Path, ema: Mapping[str, Tensor], recipe: StageRecipe) -> None:
    """Write EMA weights alone as the checkpoint `folder`: a stage grows from it, an engine is exported from it.

    It has no optimizer, random or loader state, so no run resumes from it.
    """
    folder.mkdir(parents=True)
    save_file({name: x.detach().contiguous() for name, x in ema.items()}, folder / "ema.safetensors")
    (folder / RECIPE).write_text(dumps(recipe))
    names = ("ema.safetensors", RECIPE)
    for name in names:
        durable.sync(folder / name)
    write_manifest(folder, {name: entry_of(folder / name) for name in names})


def load_weights(folder: Path, which: Part) -> dict[str, Tensor]:
    """One set of tensors by name, verified; of a run's checkpoint or of weights alone."""
    manifest, single = Manifest.read(folder), f"{which}.safetensors"
    if single in manifest.files:
        manifest.verify([single])
        return load_file(folder / single)
    return Reader(folder).whole(which)


def latest(root: Path) -> Path | None:
    """The checkpoint to resume from; None in a run that has none yet."""
    pointer, before = root / LATEST, None
    while pointer.exists():
        name = pointer.read_bytes().decode(errors="replace").strip()
        if step_of(name) is not None and (root / name).is_dir():
            return root / name
        if name == before:
            raise CheckpointCorrupt(f"{pointer} names {name!r}, which is no checkpoint there; {way_out(root)}")
        before = name  # a writer may just have moved the pointer and dropped what it named
    return None


def begin_attempt(root: Path) -> str:
    """Sweep away what a killed attempt left, and name the new one; no other rank may write before."""
    root.mkdir(parents=True, exist_ok=True)
    attempt = uuid4().hex[:12]
    durable.replace(root / ATTEMPT, attempt.encode())
    for leftover in root.glob(".*.tmp"):
        shutil.rmtree(leftover)
    return attempt


def publish(root: Path, temporary: Path, name: str) -> Path:
    """Give a complete checkpoint its name, then the pointer; durable on return."""
    final = root / name
    if final.exists():  # its run died before the pointer moved, or was sent back to an earlier step
        _remove(final)
    temporary.rename(final)
    durable.sync(root)
    durable.replace(root / LATEST, f"{name}\n".encode())
    return final


def retain(root: Path, newest: Path, keep: int) -> list[str]:
    """Drop all but the last `keep` checkpoints up to the newest; returns the names of those that stay."""
    past = [folder for folder in checkpoints(root) if folder.name <= newest.name]
    for older in past[:-keep]:
        _remove(older)
    return [folder.name for folder in past[-keep:]]


def _remove(folder: Path) -> None:
    """Make a checkpoint invisible at once, then delete its files."""
    hidden = folder.with_name(f".{folder.name}.removed.tmp")
    folder.rename(hidden)
    shutil.rmtree(hidden)
