"""Reading a checkpoint: any run of values of any tensor, whatever ranks had written them.

It owns how pieces become tensors again; it does not know who wants them. A file's digest is checked before its first
value is used, and once; a rank that reads its own pieces alone reads, and checks, only the files they lie in.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from model.checkpoint.manifest import RECIPE, STATE, Json, Manifest, corrupt
from model.checkpoint.pieces import Run, gap_in
from model.checkpoint.state import Part
from model.recipe import StageRecipe, loads_stage


class _TensorFile(Protocol):
    """The part of safetensors' reader that is used here; its tensors are views of the mapped file."""

    def get_tensor(self, name: str) -> Tensor: ...
    def metadata(self) -> Mapping[str, str] | None: ...


class Reader:
    """A checkpoint of a run, its manifest and JSON files verified.

    Raises:
        CheckpointCorrupt: here or when reading, where a byte is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = Manifest.read(folder)
        self._manifest.verify([STATE, RECIPE])
        state = json.loads((folder / STATE).read_bytes())
        if "tensors" not in state:
            raise corrupt(folder, f"{STATE} does not say which rank kept which values")
        self.recipe: StageRecipe = loads_stage((folder / RECIPE).read_text())
        self.step: int = state["step"]
        self.world_size: int = state["world_size"]
        """Ranks that wrote it; any number can read it."""
        self.loader: Json = state["loader"]
        self.inputs: Mapping[str, str] = state["inputs"]
        self._tensors: dict[Part, dict[str, dict[str, Any]]] = state["tensors"]
        self._files: dict[str, _TensorFile] = {}

    @property
    def digest(self) -> str:
        return self._manifest.digest

    def shapes(self, part: Part) -> dict[str, torch.Size]:
        """Whole tensors' shapes by name; a part that nobody had is empty."""
        return {name: torch.Size(tensor["shape"]) for name, tensor in self._tensors.get(part, {}).items()}

    def require(self, part: Part, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse a checkpoint whose tensors are not these."""
        found = self.shapes(part)
        strange, missing = sorted(found.keys() - shapes.keys()), sorted(shapes.keys() - found.keys())
        if strange or missing:
            raise ValueError(
                f"{self.folder} holds another network's {part}: it has {len(strange)} names that this one has not"
                f" {strange[:3]} and lacks {len(missing)} {missing[:3]}; resume with the recipe it was trained with"
            )
        for name, shape in shapes.items():
            if found[name] != shape:
                raise ValueError(
                    f"{self.folder} holds another network's {part}: '{name}' has shape {tuple(found[name])}, here"
                    f" {tuple(shape)}; resume with the recipe it was trained with"
                )

    def read(self, part: Part, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Values `start` to `stop` of the flattened tensor, a copy of its own."""
        tensor = self._tensors.get(part, {}).get(name)
        if tensor is None:
            raise ValueError(f"{self.folder} has no {part} tensor '{name}'; it has {len(self.shapes(part))} others")
        size, runs = math.prod(tensor["shape"]), [cast(Run, tuple(run)) for run in tensor["runs"]]
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise ValueError(f"values {start} to {stop} were asked of {part} tensor '{name}', which has {size}")
        gap = gap_in(tensor["shape"], runs)
        if gap is not None:
            raise corrupt(self.folder, f"{part} tensor '{name}': {gap}")
        pieces = list(self._cut(part, name, runs, start, stop))
        return torch.cat(pieces)

    def whole(self, part: Part) -> dict[str, Tensor]:
        """Every tensor of a part, in its shape."""
        return {name: self.read(part, name).reshape(shape) for name, shape in self.shapes(part).items()}

    def random(self, rank: int) -> dict[str, Tensor]:
        """The generators of that rank; of a rank that did not exist, those of another, taken in turn."""
        name = file_of("random", rank % self.world_size, self.world_size)
        self._manifest.verify([name])
        return load_file(self.folder / name)

    def _cut(self, part: Part, name: str, runs: list[Run], start: int, stop: int) -> Iterator[Tensor]:
        """What of each run lies between start and stop; one that is empty tells the type of a tensor without values."""
        for rank, first, last in sorted(runs, key=lambda run: run[1]):
            low, high = max(start, first), min(stop, last)
            if low < high or start == stop:
                values = self._kept(part, rank, name, first, last)
                yield values[max(low - first, 0) : max(high - first, 0)]

    def _kept(self, part: Part, rank: int, name: str, first: int, last: int) -> Tensor:
        """The values a rank wrote, mapped from its file."""
        file = file_of(part, rank, self.world_size)
        opened = self._open(file)
        try:
            values = opened.get_tensor(name).reshape(-1)
        except SafetensorError as error:
            raise corrupt(self.folder, f"{file} has no '{name}', which {STATE} says it has: {error}") from None
        stated = int((opened.metadata() or {}).get(name, 0))
        if (stated, stated + values.numel()) != (first, last):
            found = f"values {stated} to {stated + values.numel()}"
            raise corrupt(self.folder, f"{file} has {found} of '{name}', {STATE} says {first} to {last}")
        return values

    def _open(self, file: str) -> _TensorFile:
        if file not in self._files:
            self._manifest.verify([file])
            self._files[file] = cast(_TensorFile, safe_open(self.folder / file, framework="pt"))
        return self._files[file]


def file_of(part: str, rank: int, world_size: int) -> str:
    """The file of a rank's pieces."""
    return f"{part}-{rank:05d}-of-{world_size:05d}.safetensors"
