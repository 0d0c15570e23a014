"""Exponential moving average of a network's parameters, in fp32.

It owns the averaged copy and its decay; it knows nothing of training or files. Evaluation, sampling and the next
stage use these weights (paper 3.1).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The average of a network's parameters, by name.

    The decay of step n is min(decay, (1 + n) / (10 + n)): a short run would otherwise average over its random start
    (0.9999 forgets it only after some ten thousand steps).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in network.named_parameters()}
        self._parameters = list(network.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's parameters after step 0, 1, …"""
        current = [parameter.detach().float() for parameter in self._parameters]
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, current, 1 - self.decay_at(step))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take up saved averages; names and shapes must be this network's."""
        missing = sorted(self.weights.keys() ^ weights.keys())
        if missing:
            raise ValueError(f"averaged weights and network differ in {len(missing)} names, first {missing[:3]}")
        for name, average in self.weights.items():
            if weights[name].shape != average.shape:
                found, wanted = tuple(weights[name].shape), tuple(average.shape)
                raise ValueError(f"averaged weight '{name}' has shape {found}, the network's has {wanted}")
            average.copy_(weights[name])
