"""Figures sample by sample, so that two checkpoints can be compared on the same samples; `samples.json` holds them.

It owns the file's form and what makes two of them comparable; it does not know how anything is measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

SAMPLES = "samples.json"


class SampleFigures(BaseModel):
    """Metric -> sample -> figure, and what all of them depend on beside the weights."""

    # A diverged checkpoint has NaN figures; JSON has no NaN but as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    version: Literal[1] = 1
    conditions: Mapping[str, str]
    """Name -> value of what the samples are and how they were measured: figures under others do not compare."""
    figures: Mapping[str, Mapping[str, float]]

    def dumps(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """Raises ValueError where `data` is no such file."""
        return cls.model_validate_json(data)

    def write(self, path: Path) -> None:
        path.write_bytes(self.dumps())
