"""What a benchmark leaves: a table on the screen and one JSON file a benchmark and machine.

It owns the file's form and the machine's name; it does not know what is measured. The machine's name is its
hardware (`cpu-2core-xeon`, `gpu-1x-h200`), never its host name, so that results of like machines can be compared.
"""

import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "deepspeed", "diffusers", "onnx", "onnxruntime", "metaflow", "numpy")

_Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
_Hardware = Annotated[str, Field(pattern=r"^(cpu|gpu)-[a-z0-9-]+$")]
_Figure = Annotated[float, Field(allow_inf_nan=False)]
# Words of a processor's or a card's name that say nothing about its speed.
_NOISE = {"amd", "arm", "corporation", "core", "cpu", "genuine", "generic", "intel", "nvidia", "processor", "r", "tm"}


class Result(BaseModel):
    """One measurement as it is committed in `benchmarks/results/NAME.HARDWARE.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: _Name
    date: AwareDatetime
    hardware: _Hardware
    versions: dict[str, str]
    command: str
    figures: Annotated[dict[_Name, _Figure], Field(min_length=1)]

    @property
    def file_name(self) -> str:
        return f"{self.name}.{self.hardware}.json"


def report(
    name: str, figures: Mapping[str, float], *, quick: bool, peers: Sequence[str] = (), folder: Path = RESULTS
) -> Path | None:
    """Print the figures; unless `quick`, write them too and return the file.

    `peers` names further distributions whose versions belong to the figures.
    """
    result = Result(
        name=name,
        date=datetime.now(UTC).replace(microsecond=0),
        hardware=hardware(),
        versions=versions(*peers),
        command=f"python -m benchmarks.{name}" + "".join(f" {argument}" for argument in sys.argv[1:]),
        figures=dict(figures),
    )
    console = Console()
    console.print(_table(result))
    if quick:
        console.print("--quick measures too little to be kept: nothing was written to benchmarks/results")
        return None
    path = write(result, folder)
    console.print(f"written to {path}; commit it if the machine was quiet, then run `make bench-docs`")
    return path


def write(result: Result, folder: Path = RESULTS) -> Path:
    """Put the result in its file; the one that stood there for this machine is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result.file_name
    path.write_text(result.model_dump_json(indent=2) + "\n")
    return path


def read_all(folder: Path = RESULTS) -> list[Result]:
    """Every committed result, by name and hardware."""
    results: list[Result] = []
    for path in sorted(folder.glob("*.json")):
        result = Result.model_validate_json(path.read_bytes())
        if path.name != result.file_name:
            raise ValueError(f"{path} holds the result that belongs in {result.file_name}; rename it")
        results.append(result)
    return results


def hardware() -> str:
    """What this process measures on: its GPUs if PyTorch sees any, else its processor."""
    import torch  # a second to import, and reading results needs none of it

    if torch.cuda.is_available():
        return f"gpu-{torch.cuda.device_count()}x-{slug(torch.cuda.get_device_name(0))}"
    return f"cpu-{_usable_cores()}core-{slug(_processor())}"


def versions(*more: str) -> dict[str, str]:
    """Python and the libraries that decide speed; `more` must be installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES + more:
        found[library] = importlib.metadata.version(library)
    return found


def slug(text: str) -> str:
    """A hardware name of a few words: 'Intel(R) Xeon(R) Processor' is 'xeon'."""
    text = re.sub(r"\b\d+-core\b|@.*", " ", text.lower())
    words = [word for word in re.split(r"[^a-z0-9]+", text) if word and word not in _NOISE]
    return "-".join(words[:4]) or "unknown"


def number(value: float) -> str:
    """Four significant digits: 623.4, 0.00001312 as 1.312e-05."""
    if value == 0 or (abs(value) < 1e6 and value == int(value)):
        return str(int(value))
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(digits, 0)}f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"


def _table(result: Result) -> Table:
    table = Table("figure", title=f"{result.name} on {result.hardware}", title_justify="left")
    table.add_column("value", justify="right")
    for key, value in result.figures.items():
        table.add_row(key, number(value))
    return table


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value
    return platform.machine()
