"""Exponential moving average of a network's parameters, in fp32.

It owns the averages of the runs that a rank keeps, and their decay; it knows nothing of training or files. Evaluation,
sampling and the next stage use these weights (paper 3.1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.optim.fragment import Fragment


class Ema:
    """The averages of a rank's masters.

    The decay of step n is min(decay, (1 + n) / (10 + n)): a short run would otherwise average over its random start
    (0.9999 forgets it only after some ten thousand steps).
    """

    def __init__(self, masters: Sequence[Fragment], decay: float) -> None:
        self.decay = decay
        self._masters = [run.values.detach() for run in masters]
        self.averages = [Fragment(run.name, run.shape, run.start, run.values.detach().clone()) for run in masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the masters after step 0, 1, …"""
        averages = [run.values for run in self.averages]
        torch._foreach_lerp_(averages, self._masters, 1 - self.decay_at(step))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    def load(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Take up saved averages: `read` gives the values from a first to an end of a named parameter."""
        for run in self.averages:
            run.values.copy_(read(run.name, run.start, run.stop))
