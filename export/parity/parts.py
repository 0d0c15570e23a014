"""Parity of a frozen part: does its file compute what its module does?

It owns the errors and the verdict; it knows nothing of what a part is for or of what runs its file.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import ConfigDict
from torch import Tensor

from export.parity.check import relative_error
from export.parity.report import BOUNDS, ParityFailed
from export.parts import Part
from model.config import Config

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""The part's file on some runtime: inputs by name -> outputs in order."""

ROOM = 2
"""Times what a call of the network is allowed: a decoder has more products in a row, and its image takes no average."""


class PartParity(Config):
    """One part on several inputs."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    part: str
    precision: str
    sizes: tuple[dict[str, tuple[int, ...]], ...]
    relative_errors: tuple[float, ...]
    """Of each input, the worst of its outputs; NaN if one is not finite."""

    @property
    def worst(self) -> float:
        return max(self.relative_errors, key=lambda error: math.inf if math.isnan(error) else error)


@torch.no_grad()
def check_part(part: Part, run: Run, cases: Sequence[Mapping[str, Tensor]], *, precision: str = "fp32") -> PartParity:
    """Compare on `cases`, which should hold sizes of 1 and real contents.

    Raises:
        ParityFailed: one output is further off than `precision` allows, see `report.BOUNDS`.
    """
    errors: list[float] = []
    for case in cases:
        expected = part.module(**case)
        outputs = [expected] if isinstance(expected, Tensor) else list(expected)
        found = run(case)
        errors.append(
            max(map(relative_error, found, outputs), key=lambda error: math.inf if math.isnan(error) else error)
        )
    sizes = tuple({name: tuple(value.shape) for name, value in case.items()} for case in cases)
    report = PartParity(part=part.name, precision=precision, sizes=sizes, relative_errors=tuple(errors))
    bound = ROOM * BOUNDS[precision].relative_error
    if not errors or not report.worst <= bound:
        raise ParityFailed(
            f"{part.name}: relative error {report.worst if errors else math.nan:.3g}, {precision} allows {bound:g}",
            report,
        )
    return report
