"""Checkpoints: folders of safetensors by parameter name, JSON, and a manifest with the digest of every file.

It owns the layout, the commit and the verification; it knows nothing of ranks, stores or promotion. A checkpoint
becomes visible by one rename, `latest` by one replace, and no byte of it is used before its digest is checked.
Nothing is pickled, so that reading one can run no code.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from model.recipe import StageRecipe, dumps, loads_stage

Json = Mapping[str, Any]

LATEST = "latest"
MANIFEST = "manifest.json"
_TENSORS = ("model", "ema", "optimizer", "random")
_FILES = (*(f"{part}.safetensors" for part in _TENSORS), "state.json", "recipe.json")
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointCorrupt(ValueError):
    """A checkpoint that is not what was written; the message says what is wrong and which others are intact."""


@dataclass(slots=True)
class TrainState:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    """The process-wide generators, see `random_state`."""
    loader: Json
    inputs: Mapping[str, str]
    """Digest of each thing the run was started from; it may not change under a run."""
    recipe: StageRecipe


def save(root: Path, state: TrainState, *, keep: int) -> Path:
    """Write the checkpoint `root/step-N`, point `root/latest` at it, drop all but the last `keep`; durable on return.

    One writer a root. What a killed writer left behind is invisible and removed by the next one.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*.tmp"):
        shutil.rmtree(leftover)
    final = root / f"step-{state.step:08d}"
    temporary = root / f".{final.name}.tmp"
    temporary.mkdir()
    _write_files(temporary, state)
    if final.exists():  # its run died before the pointer moved, or was sent back to an earlier step
        _remove(final)
    temporary.rename(final)
    _sync(root)
    _point(root, final.name)
    for older in [folder for folder in _checkpoints(root) if folder.name <= final.name][:-keep]:
        _remove(older)
    return final


def save_weights(folder: Path, ema: Mapping[str, Tensor], recipe: StageRecipe) -> None:
    """Write EMA weights alone as the checkpoint `folder`: a stage grows from it, an engine is exported from it.

    It has no optimizer, random or loader state, so no run resumes from it.
    """
    folder.mkdir(parents=True)
    save_file({name: x.detach().contiguous() for name, x in ema.items()}, folder / "ema.safetensors")
    (folder / "recipe.json").write_text(dumps(recipe))
    _write_manifest(folder, ["ema.safetensors", "recipe.json"])


def load(folder: Path) -> TrainState:
    """The whole state, verified."""
    _verified(folder, _FILES)
    state = json.loads((folder / "state.json").read_text())
    tensors = {part: load_file(folder / f"{part}.safetensors") for part in _TENSORS}
    recipe = loads_stage((folder / "recipe.json").read_text())
    return TrainState(step=state["step"], loader=state["loader"], inputs=state["inputs"], recipe=recipe, **tensors)


def load_weights(folder: Path, which: Literal["ema", "model"]) -> dict[str, Tensor]:
    """One set of weights by parameter name, verified."""
    _verified(folder, [f"{which}.safetensors"])
    return load_file(folder / f"{which}.safetensors")


def verify(folder: Path) -> str:
    """Check every file against the manifest; returns `digest_of` the checkpoint.

    Raises:
        CheckpointCorrupt: a file is missing or differs.
    """
    return _verified(folder, _FILES)


def digest_of(folder: Path) -> str:
    """The digest that names a checkpoint's whole content; only the manifest is read."""
    return _verified(folder, ())


def latest(root: Path) -> Path | None:
    """The checkpoint to resume from; None in a run that has none yet."""
    pointer = root / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_bytes().decode(errors="replace").strip()
    if not _NAME.fullmatch(name) or not (root / name).is_dir():
        raise CheckpointCorrupt(f"{pointer} names {name!r}, which is no checkpoint there; {_way_out(root)}")
    return root / name


def random_state() -> dict[str, Tensor]:
    """The process-wide generators of python, numpy and torch as plain tensors."""
    _, words, _ = random.getstate()
    _, keys, position, *_ = cast(tuple[str, np.ndarray[Any, Any], int, int, float], np.random.get_state(legacy=True))
    return {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }


def restore_random(state: Mapping[str, Tensor]) -> None:
    """Put the process-wide generators back to what `random_state` saw."""
    words = tuple(int(word) for word in state["python"].numpy())
    random.setstate((3, words, None))
    *keys, position = (int(word) for word in state["numpy"].numpy())
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(state["torch"])


def _write_files(folder: Path, state: TrainState) -> None:
    for part in _TENSORS:
        tensors = cast(dict[str, Tensor], getattr(state, part))
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, folder / f"{part}.safetensors")
    (folder / "recipe.json").write_text(dumps(state.recipe))
    written = {
        "step": state.step,
        "loader": state.loader,
        "inputs": state.inputs,
        "recipe_sha256": _digest(folder / "recipe.json"),
    }
    (folder / "state.json").write_text(json.dumps(written, indent=2, sort_keys=True))
    _write_manifest(folder, _FILES)


def _write_manifest(folder: Path, names: Iterable[str]) -> None:
    """The last file of a checkpoint; all of it is durable on return."""
    entries = {name: {"sha256": _digest(folder / name), "size": (folder / name).stat().st_size} for name in names}
    (folder / MANIFEST).write_text(_manifest_text(entries))
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _point(root: Path, name: str) -> None:
    temporary = root / f"{LATEST}.new"
    temporary.write_text(name + "\n")
    _sync(temporary)
    temporary.replace(root / LATEST)
    _sync(root)


def _remove(folder: Path) -> None:
    """Make a checkpoint invisible at once, then delete its files."""
    hidden = folder.with_name(f".{folder.name}.removed.tmp")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _verified(folder: Path, names: Iterable[str]) -> str:
    try:
        return _check(folder, names)
    except _Mismatch as mismatch:
        raise CheckpointCorrupt(f"checkpoint {folder}: {mismatch}; {_way_out(folder.parent, folder.name)}") from None


class _Mismatch(Exception):
    """What differs, before a way out is known."""


def _check(folder: Path, names: Iterable[str]) -> str:
    files, digest = _read_manifest(folder)
    for name in names:
        path = folder / name
        if name not in files:
            raise _Mismatch(f"{MANIFEST} lists no {name} (an imported checkpoint has weights only)")
        if not path.is_file():
            raise _Mismatch(f"{name} is missing")
        if path.stat().st_size != files[name]["size"]:
            raise _Mismatch(f"{name} has {path.stat().st_size} bytes, its manifest says {files[name]['size']}")
        sha256 = _digest(path)
        if sha256 != files[name]["sha256"]:
            raise _Mismatch(f"{name} has sha256 {sha256}, its manifest says {files[name]['sha256']}")
    return digest


def _read_manifest(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    path = folder / MANIFEST
    if not path.is_file():
        raise _Mismatch(f"{MANIFEST} is missing")
    text = path.read_bytes().decode(errors="replace")
    try:
        manifest = json.loads(text)
        expected = _manifest_text(manifest["files"])
        stated = manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise _Mismatch(f"{MANIFEST} is not a manifest: {error!r}") from None
    if text != expected:
        found = json.loads(expected)["sha256"]
        raise _Mismatch(f"{MANIFEST} has content of sha256 {found}, it says {stated} itself (or a stray byte)")
    return manifest["files"], stated


def _manifest_text(files: Json) -> str:
    """The one way to write these files' manifest, so that any changed byte of it shows."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=2, sort_keys=True)


def _way_out(root: Path, but: str = "") -> str:
    others = [folder.name for folder in _checkpoints(root) if folder.name != but and _is_intact(folder)]
    if others:
        return f"to resume from the one before, write {others[-1]} into {root / LATEST} (intact: {', '.join(others)})"
    return "no other checkpoint there is intact: fetch it again, or empty the run folder to start anew"


def _is_intact(folder: Path) -> bool:
    try:
        _check(folder, _FILES)
    except _Mismatch:
        return False
    return True


def _checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
