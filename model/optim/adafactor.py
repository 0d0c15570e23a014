"""AdaFactor with the paper's setting.

It owns the rule and its state; it knows nothing of gradient clipping, ranks or files.
Shapes are kept, so AdaFactor is exact only where parameters keep theirs: not under an engine that flattens them (ZeRO
stages 1 to 3).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.optim.optimizer import StageOptimizer

EPSILON = 1e-30
"""Added to squared gradients, so that a gradient of zero divides."""
STACK_VALUES = 1 << 18
"""Parameters of one shape step together up to this many values: fewer calls, yet each pass stays in the cache."""


@dataclass(slots=True, frozen=True)
class _Stack:
    """Parameters of one shape and their state, stacked along a new first axis."""

    parameters: list[nn.Parameter]
    momentum: Tensor
    """[N, R, C], or [N, C] for vectors."""
    row: Tensor | None
    """[N, R]: running mean of the squared gradient over columns; None for vectors."""
    column: Tensor
    """[N, C]: running mean of the squared gradient over rows; a vector's full second moment."""

    def step(self, rate: float, beta1: float, beta2: float, clip_threshold: float) -> None:
        update = torch.stack([_matrix(cast(Tensor, parameter.grad)) for parameter in self.parameters])
        square = update.square().add_(EPSILON)
        if self.row is None:
            self.column.lerp_(square, 1 - beta2)
            update.mul_(self.column.rsqrt())
        else:
            self.row.lerp_(square.mean(2), 1 - beta2)
            self.column.lerp_(square.mean(1), 1 - beta2)
            update.mul_((self.row / self.row.mean(1, keepdim=True)).rsqrt_()[:, :, None])
            update.mul_(self.column.rsqrt()[:, None, :])

        rms = _norms(update.flatten(1)) / update[0].numel() ** 0.5
        scale = rate * (1 - beta1) / (rms / clip_threshold).clamp_min_(1.0)
        self.momentum.mul_(beta1).addcmul_(update, scale.reshape(-1, *[1] * (update.ndim - 1)))
        for parameter, move in zip(self.parameters, self.momentum.unbind(), strict=True):
            parameter.sub_(move.view_as(parameter))


class AdaFactor(StageOptimizer):
    """AdaFactor as STIV trains with it (3.1): factored second moment, constant beta2 with bias correction, update clip
    per tensor, momentum without bias correction; no parameter scaling, no relative step, no weight decay.

    A tensor of two or more dimensions is factored as the matrix [first, product of the rest]; a vector is not. The
    state has parts `row`, `column` and `momentum`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        clip_threshold: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "clip_threshold": clip_threshold, "step": 0}
        super().__init__(params, defaults)
        self._stacks: dict[tuple[int, ...], _Stack] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            beta2 = corrected_beta2(group["beta2"], group["step"])
            for parameters in _alike(p for p in group["params"] if p.grad is not None):
                self._stack(parameters).step(group["lr"], group["beta1"], beta2, group["clip_threshold"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._stacks.clear()

    def _set_step(self, step: int) -> None:
        self._stacks.clear()
        for group in self.param_groups:
            group["step"] = step

    def _stack(self, parameters: list[nn.Parameter]) -> _Stack:
        """The stacked state of these parameters; `self.state` holds views of it."""
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._stacks:
            # Another composition of the same parameters holds views that are about to become stale.
            self._stacks = {ids: stack for ids, stack in self._stacks.items() if not set(ids) & set(key)}
            shape = _matrix(parameters[0]).shape
            row = self._stacked("row", parameters, shape[:-1]) if len(shape) == 2 else None
            column = self._stacked("column", parameters, shape[-1:])
            self._stacks[key] = _Stack(parameters, self._stacked("momentum", parameters, shape), row, column)
        return self._stacks[key]

    def _stacked(self, part: str, parameters: list[nn.Parameter], shape: torch.Size) -> Tensor:
        like = parameters[0]
        held = [self.state[p].get(part) for p in parameters]
        stacked = torch.stack([like.new_zeros(shape) if x is None else x.reshape(shape) for x in held])
        for parameter, view in zip(parameters, stacked.unbind(), strict=True):
            self.state[parameter][part] = view
        return stacked


def corrected_beta2(beta2: float, step: int) -> float:
    """Constant beta2 with its bias correction folded in: 0 at step 1, towards `beta2` later."""
    return beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)


def _norms(rows: Tensor) -> Tensor:
    norm = cast(Callable[..., Tensor], torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
    return norm(rows, dim=1)


def _matrix(tensor: Tensor) -> Tensor:
    """As the rule sees it: a matrix, or a vector."""
    return tensor.flatten(1) if tensor.ndim >= 2 else tensor.reshape(-1)


def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one shape, type and device together, at most STACK_VALUES values a list."""
    lists: dict[object, list[list[nn.Parameter]]] = {}
    for parameter in parameters:
        shape = _matrix(parameter).shape
        alike = lists.setdefault((shape, parameter.dtype, parameter.device), [[]])
        if (len(alike[-1]) + 1) * parameter.numel() > STACK_VALUES and alike[-1]:
            alike.append([])
        alike[-1].append(parameter)
    return [entry for alike in lists.values() for entry in alike]
