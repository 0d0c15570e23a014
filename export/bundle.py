"""Engine bundles: a folder with all that serving a stage takes, each file named by its digest in `bundle.json`.

It owns the layout, the digests and that a bundle is there whole or not at all; it knows nothing of what runs the model.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from export.engines.card import CARD, EngineCard, describe
from export.engines.protocol import EngineCorrupt, EngineMismatch
from export.parity.report import ParityReport
from model.config import Config
from model.recipe import StageRecipe, dumps, loads_stage
from model.vae import FrameCodec

MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
RECIPE = "recipe.json"
PARITY = "parity.json"
PICTURE = "parity.png"
INDEX = "bundle.json"


class BundleFile(Config):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class BundleIndex(Config):
    """What `bundle.json` says."""

    format: Literal[1] = 1
    stage: str
    files: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.]*$")], BundleFile]


@dataclass(slots=True, frozen=True)
class EngineBundle:
    """A verified folder."""

    folder: Path
    recipe: StageRecipe
    parity: ParityReport
    index: BundleIndex

    @property
    def files(self) -> Mapping[str, Path]:
        """Every file of the bundle, `bundle.json` too."""
        return {name: self.folder / name for name in (*self.index.files, INDEX)}

    @property
    def digest(self) -> str:
        """Names the bundle: the digest of its index, which names every other file."""
        return _digest(self.folder / INDEX)


def write_bundle(
    folder: Path,
    *,
    model: Path,
    codec: FrameCodec,
    recipe: StageRecipe,
    parity: ParityReport,
    card: EngineCard | None = None,
    extra: Mapping[str, Path] | None = None,
) -> EngineBundle:
    """Gather a proven `model` and what it is served with into `folder`, which must not exist yet.

    Without a `card` it is an engine for ONNX Runtime on the CPU. `extra` are files beside these, by the names they get;
    the index names and digests them like all others.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; a bundle never changes, so name a new folder or remove that one")
    parity.require_passed()
    if parity.subject != _digest(model):
        raise EngineMismatch(
            f"the parity report is about file {parity.subject[:12]}, {model} is {_digest(model)[:12]}; check this one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _copy_model(model, draft)
        codec.save(draft)
        (draft / RECIPE).write_text(dumps(recipe))
        (draft / CARD).write_text((card or describe(model)).model_dump_json(indent=2))
        (draft / PARITY).write_text(parity.model_dump_json(indent=2))
        for name, source in (extra or {}).items():
            if (draft / name).exists():
                raise ValueError(f"a bundle has a {name} of its own; give the extra file another name")
            shutil.copyfile(source, draft / name)
        files = {path.name: _describe(path) for path in sorted(draft.iterdir())}
        (draft / INDEX).write_text(BundleIndex(stage=recipe.name, files=files).model_dump_json(indent=2))
        draft.chmod(0o755)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load_bundle(folder)


def load_bundle(folder: Path) -> EngineBundle:
    """The bundle in `folder`, after every byte was compared with its index."""
    if not (folder / INDEX).is_file():
        raise EngineCorrupt(f"{folder} holds no {INDEX}: it is not an engine bundle; export a checkpoint to it")
    try:
        index = BundleIndex.model_validate_json((folder / INDEX).read_bytes())
    except ValidationError as error:
        raise EngineCorrupt(f"{folder / INDEX} cannot be read, fetch the bundle again: {error}") from None
    for name in (MODEL, RECIPE, PARITY, CARD):
        if name not in index.files:
            raise EngineCorrupt(f"{folder / INDEX} names no {name}; export the checkpoint again")
    for name, expected in index.files.items():
        _verify(folder / name, expected)
    return EngineBundle(
        folder=folder,
        recipe=loads_stage((folder / RECIPE).read_bytes()),
        parity=ParityReport.model_validate_json((folder / PARITY).read_bytes()),
        index=index,
    )


def _copy_model(model: Path, draft: Path) -> None:
    beside = model.with_name(model.name + ".data")
    if beside.exists() and model.name != MODEL:
        raise ValueError(f"{model} names its weights file {beside.name}; export to a file called {MODEL}")
    shutil.copyfile(model, draft / MODEL)
    if beside.exists():
        shutil.copyfile(beside, draft / MODEL_DATA)


def _verify(path: Path, expected: BundleFile) -> None:
    if not path.is_file():
        raise EngineCorrupt(f"{path} is missing; fetch the bundle again, or export the checkpoint again")
    found = _describe(path)
    if found != expected:
        raise EngineCorrupt(
            f"{path} has {found.bytes} bytes and sha256 {found.sha256[:12]}, {INDEX} says {expected.bytes} and"
            f" {expected.sha256[:12]}; fetch the bundle again, or export the checkpoint again"
        )


def _describe(path: Path) -> BundleFile:
    return BundleFile(sha256=_digest(path), bytes=path.stat().st_size)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
