"""A fragment: the run of a parameter's values that one rank keeps, whatever cut the parameters into runs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, frozen=True, eq=False)
class Fragment:
    """Values `start` to `start + numel` of a flattened parameter."""

    name: str
    """The parameter's."""
    shape: torch.Size
    """The whole parameter's."""
    start: int
    values: Tensor
    """fp32 [numel]: the masters themselves, a view of what the optimizer moves."""

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def is_whole(self) -> bool:
        return self.values.numel() == math.prod(self.shape)
