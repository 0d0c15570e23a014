"""What a stage's optimizer offers beside its rule, and AdamW with it.

Its tensors may be parameters or flat runs of several (ZeRO's partitions); `hold` says which, and its state is saved and
loaded by parameter name either way. It knows nothing of gradient clipping or files.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from model.optim.fragment import Fragment

ReadState = Callable[[str, int, int], Tensor]
"""`PART:NAME`, first value, end -> those values of the whole part, flat."""


class StageOptimizer(torch.optim.Optimizer):
    """An optimizer with one learning rate, and a state by parameter name."""

    _held: Mapping[Tensor, Sequence[Fragment]]

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

    def hold(self, held: Mapping[Tensor, Sequence[Fragment]], group: ProcessGroup | None = None) -> None:
        """Before the first step: the runs that each tensor of the parameter groups is made of, as views of it.

        Args:
            group: ranks that hold the other runs of parameters that are cut; every one of them calls this.
        """
        self._held = held

    def state_of(self, kept: Sequence[Fragment]) -> list[Fragment]:
        """The state that belongs to `kept`, by `PART:NAME`, no copies; what is one for a whole parameter comes with its
        first value."""
        raise NotImplementedError

    def load_state(self, read: ReadState, step: int) -> None:
        """Take up what all ranks' `state_of` gave after `step` steps, however it was cut then."""
        raise NotImplementedError


class AdamW(StageOptimizer, torch.optim.AdamW):
    """torch's AdamW; the state has parts `exp_avg` and `exp_avg_sq`."""

    def hold(self, held: Mapping[Tensor, Sequence[Fragment]], group: ProcessGroup | None = None) -> None:
        super().hold(held, group)
        self.state.clear()  # DeepSpeed may have stepped once with zeros to make it

    def state_of(self, kept: Sequence[Fragment]) -> list[Fragment]:
        homes = {held.name: (tensor, held) for tensor, runs in self._held.items() for held in runs}
        pieces: list[Fragment] = []
        for fragment in kept:
            tensor, held = homes[fragment.name]
            first = offset_in(tensor, held) + fragment.start - held.start
            for part in ("exp_avg", "exp_avg_sq"):
                values = self.state[tensor][part].reshape(-1)[first : first + fragment.values.numel()]
                pieces.append(Fragment(f"{part}:{fragment.name}", fragment.shape, fragment.start, values))
        return pieces

    def load_state(self, read: ReadState, step: int) -> None:
        for tensor, runs in self._held.items():
            state = {part: torch.zeros_like(tensor) for part in ("exp_avg", "exp_avg_sq")}
            for part, whole in state.items():
                for held in runs:
                    first = offset_in(tensor, held)
                    values = whole.view(-1)[first : first + held.values.numel()]
                    values.copy_(read(f"{part}:{held.name}", held.start, held.stop))
            self.state[tensor] = {"step": torch.tensor(float(step)), **state}


def offset_in(tensor: Tensor, held: Fragment) -> int:
    """Where in the flattened `tensor` the run begins that is a view of it."""
    return (held.values.data_ptr() - tensor.data_ptr()) // tensor.element_size()
