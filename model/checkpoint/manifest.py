"""A checkpoint's manifest: size and sha256 of each of its files, and one digest that names the whole.

It owns what a manifest looks like, the verification against it, and what to say of a checkpoint that fails it. It does
not know what the files hold, nor how they came to be.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from model.checkpoint import durable

Json = Mapping[str, Any]

MANIFEST = "manifest.json"
STATE = "state.json"
RECIPE = "recipe.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")


class Entry(TypedDict):
    """What the manifest says of a file."""

    sha256: str
    size: int


class CheckpointCorrupt(ValueError):
    """A checkpoint that is not what was written; the message says what is wrong and which others are intact."""


@dataclass(slots=True, frozen=True)
class Manifest:
    """A checkpoint's files; itself verified, the files not."""

    folder: Path
    files: Mapping[str, Entry]
    digest: str

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        found = _parse(folder)
        if isinstance(found, str):
            raise corrupt(folder, found)
        return found

    def verify(self, names: Iterable[str]) -> None:
        """Hold these files against the manifest, every byte of them."""
        problem = self.problem(names)
        if problem is not None:
            raise corrupt(self.folder, problem)

    def problem(self, names: Iterable[str]) -> str | None:
        """What is wrong with the first of these files that is not what was written."""
        for name in names:
            path = self.folder / name
            if name not in self.files:
                return f"{MANIFEST} lists no {name}" + (
                    " (an imported checkpoint has weights only)" if STATE not in self.files else ""
                )
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != self.files[name]["size"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {self.files[name]['size']}"
            sha256 = durable.digest(path)
            if sha256 != self.files[name]["sha256"]:
                return f"{name} has sha256 {sha256}, its manifest says {self.files[name]['sha256']}"
        return None


def verify(folder: Path) -> str:
    """Check every file against the manifest; returns `digest_of` the checkpoint.

    Raises:
        CheckpointCorrupt: a file is missing or differs, or there is nothing in it to resume from.
    """
    manifest = Manifest.read(folder)
    manifest.verify([STATE, *manifest.files])
    return manifest.digest


def digest_of(folder: Path) -> str:
    """The digest that names a checkpoint's whole content; only the manifest is read."""
    return Manifest.read(folder).digest


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> bytes:
    """The last file of a checkpoint, written once; returns its bytes."""
    data = _text(files).encode()
    durable.write(folder / MANIFEST, data)
    durable.sync(folder)
    return data


def entry_of(path: Path) -> Entry:
    return {"sha256": durable.digest(path), "size": path.stat().st_size}


def entry_of_bytes(data: bytes) -> Entry:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def corrupt(folder: Path, what: str) -> CheckpointCorrupt:
    """What is wrong with a checkpoint, and how a run goes on without it."""
    return CheckpointCorrupt(f"checkpoint {folder}: {what}; {way_out(folder.parent, folder.name)}")


def way_out(root: Path, but: str = "") -> str:
    others = [folder.name for folder in checkpoints(root) if folder.name != but and _is_intact(folder)]
    if others:
        return f"to resume from the one before, write {others[-1]} into {root / LATEST} (intact: {', '.join(others)})"
    return "no other checkpoint there is intact: fetch it again, or empty the run folder to start anew"


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None if it is no such name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def _parse(folder: Path) -> Manifest | str:
    """The manifest, or what is wrong with it."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing"
    text = path.read_bytes().decode(errors="replace")
    try:
        manifest = json.loads(text)
        expected = _text(manifest["files"])
        stated = manifest["sha256"]
        elsewhere = [name for name in manifest["files"] if Path(name).name != name]
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is not a manifest: {error!r}"
    if text != expected:
        found = json.loads(expected)["sha256"]
        return f"{MANIFEST} has content of sha256 {found}, it says {stated} itself (or a stray byte)"
    if elsewhere:
        return f"{MANIFEST} lists {elsewhere[0]!r}, which is no file of this folder"
    return Manifest(folder, manifest["files"], stated)


def _text(files: Mapping[str, Entry]) -> str:
    """The one way to write these files' manifest, so that any changed byte of it shows."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=2, sort_keys=True)


def _is_intact(folder: Path) -> bool:
    manifest = _parse(folder)
    return isinstance(manifest, Manifest) and manifest.problem([STATE, *manifest.files]) is None
