"""What a stage's optimizer offers beside its rule, and AdamW with it.

It knows nothing of gradient clipping, ranks or files.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


class StageOptimizer(torch.optim.Optimizer):
    """What a stage's optimizer offers beside its rule: one learning rate, and its state by parameter name."""

    @property
    def learning_rate(self) -> float:
        return self.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self.param_groups:
            group["lr"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # torch wraps this method so that its first call imports torch.compile's tracer: 3 s of every rank's start.
        plain = getattr(super().add_param_group, "__wrapped__", None)
        if plain is None:
            super().add_param_group(param_group)
        else:
            plain(self, param_group)

    def state_by_name(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        """`PART:NAME` for each part of the state of every parameter that has stepped, steps left out; no copies."""
        return {
            f"{part}:{names[cast(nn.Parameter, parameter)]}": tensor
            for parameter, state in self.state.items()
            for part, tensor in cast(dict[str, Tensor], state).items()
            if part != "step"
        }

    def load_state_by_name(self, tensors: Mapping[str, Tensor], names: Mapping[nn.Parameter, str], step: int) -> None:
        """Take up what `state_by_name` gave after `step` steps."""
        wanted = {name: parameter for parameter, name in names.items()}
        self.state.clear()
        for key, tensor in tensors.items():
            part, _, name = key.partition(":")
            if name not in wanted:
                raise ValueError(f"optimizer state '{key}' belongs to no parameter of this network")
            self.state[wanted[name]][part] = tensor.to(wanted[name].device)
        self._set_step(step)

    def _set_step(self, step: int) -> None:
        raise NotImplementedError


class AdamW(StageOptimizer, torch.optim.AdamW):
    """torch's AdamW; the state has parts `exp_avg` and `exp_avg_sq`."""

    def _set_step(self, step: int) -> None:
        for state in self.state.values():
            state["step"] = torch.tensor(float(step))
