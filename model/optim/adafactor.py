"""AdaFactor with the paper's setting, exact also where parameters are cut into runs of a flat partition (ZeRO 1 and 2).

It owns the rule and its state; it knows nothing of gradient clipping, of who cut the parameters, or of files. Row and
column statistics need whole parameters. Nearly all that a partition holds are whole, and step as if nothing were cut;
the few at its borders are `cut`'s.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from model.optim.cut import CutParameters, agree
from model.optim.fragment import Fragment
from model.optim.optimizer import ReadState, StageOptimizer, offset_in
from model.optim.rule import EPSILON, Rule, corrected_beta2

STACK_VALUES = 1 << 18
"""Parameters of one shape step together up to this many values: fewer calls, yet each pass stays in the cache."""


@dataclass(slots=True, frozen=True, eq=False)
class _Whole:
    """A parameter that is all here: a tensor of a parameter group itself, or a part of one."""

    values: Tensor
    source: Tensor
    offset: int

    @property
    def gradient(self) -> Tensor | None:
        """As the rule sees it: a matrix, or a vector."""
        if self.source.grad is None:
            return None
        flat = self.source.grad.reshape(-1)
        return _matrix(flat[self.offset : self.offset + self.values.numel()].view(self.values.shape))


@dataclass(slots=True, frozen=True)
class _Stack:
    """Parameters of one shape and their state, stacked along a new first axis."""

    parameters: list[_Whole]
    momentum: Tensor
    """[N, R, C], or [N, C] for vectors."""
    row: Tensor | None
    """[N, R]: running mean of the squared gradient over columns; None for vectors."""
    column: Tensor
    """[N, C]: running mean of the squared gradient over rows; a vector's full second moment."""

    def step(self, rule: Rule) -> None:
        update = torch.stack([cast(Tensor, parameter.gradient) for parameter in self.parameters])
        square = update.square().add_(EPSILON)
        if self.row is None:
            self.column.lerp_(square, 1 - rule.beta2)
            update.mul_(self.column.rsqrt())
        else:
            self.row.lerp_(square.mean(2), 1 - rule.beta2)
            self.column.lerp_(square.mean(1), 1 - rule.beta2)
            update.mul_((self.row / self.row.mean(1, keepdim=True)).rsqrt_()[:, :, None])
            update.mul_(self.column.rsqrt()[:, None, :])

        rms = _norms(update.flatten(1)) / update[0].numel() ** 0.5
        scale = rule.lr * (1 - rule.beta1) / (rms / rule.clip_threshold).clamp_min_(1.0)
        moves = rule.accumulate(self.momentum, update, scale.reshape(-1, *[1] * (update.ndim - 1)))
        for parameter, move in zip(self.parameters, moves.unbind(), strict=True):
            parameter.values.sub_(move.view_as(parameter.values))


class AdaFactor(StageOptimizer):
    """AdaFactor as STIV trains with it (3.1): factored second moment, constant beta2 with bias correction, update clip
    per tensor, momentum without bias correction; no parameter scaling, no relative step, no weight decay.

    A tensor of two or more dimensions is factored as the matrix [first, product of the rest]; a vector is not. The
    state has parts `row`, `column` and `momentum`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        clip_threshold: float = 1.0,
        momentum_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "clip_threshold": clip_threshold, "step": 0}
        super().__init__(params, defaults)
        self.momentum_dtype = momentum_dtype
        self._wholes: dict[Tensor, list[_Whole]] = {}
        """By tensor of a parameter group; one that nobody spoke of is a parameter itself."""
        self._cuts: dict[Tensor, CutParameters] = {}
        self._names: dict[str, _Whole] = {}
        self._parts: dict[_Whole, dict[str, Tensor]] = {}
        self._stacks: dict[tuple[int, ...], _Stack] = {}

    def hold(self, held: Mapping[Tensor, Sequence[Fragment]], group: ProcessGroup | None = None) -> None:
        super().hold(held, group)
        # At ZeRO 0 in bf16, DeepSpeed has stepped once with zeros, to make the state.
        for state in (self._wholes, self._parts, self._stacks):
            state.clear()
        for param_group in self.param_groups:
            param_group["step"] = 0
        for tensor, runs in held.items():
            whole = {run.name: run for run in runs if run.is_whole}
            places = {name: (run.values.view(run.shape), offset_in(tensor, run)) for name, run in whole.items()}
            named = {name: _Whole(values, tensor, offset) for name, (values, offset) in places.items()}
            self._wholes[tensor] = list(named.values())
            self._names |= named
            cut = [run for run in runs if not run.is_whole]
            everywhere = agree(cut, group)
            if everywhere:
                self._cuts[tensor] = CutParameters(tensor, cut, everywhere, group, self.momentum_dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            beta2 = corrected_beta2(group["beta2"], group["step"])
            rule = Rule(group["lr"], group["beta1"], beta2, group["clip_threshold"])
            wholes = [whole for tensor in group["params"] for whole in self._in(tensor)]
            for parameters in _alike(whole for whole in wholes if whole.source.grad is not None):
                self._stack(parameters).step(rule)
            for tensor in group["params"]:
                if tensor in self._cuts:
                    self._cuts[tensor].step(rule)
        return loss

    def state_of(self, kept: Sequence[Fragment]) -> list[Fragment]:
        pieces: list[Fragment] = []
        for fragment in kept:
            whole = self._names.get(fragment.name)
            if whole is None:
                continue
            parts = self._parts[whole]
            momentum = parts["momentum"].reshape(-1)[fragment.start : fragment.stop]
            pieces.append(Fragment(f"momentum:{fragment.name}", fragment.shape, fragment.start, momentum))
            if fragment.start == 0:
                factors = [(part, parts[part]) for part in ("row", "column") if part in parts]
                pieces += [Fragment(f"{part}:{fragment.name}", x.shape, 0, x.view(-1)) for part, x in factors]
        return [*pieces, *(piece for cut in self._cuts.values() for piece in cut.state())]

    def load_state(self, read: ReadState, step: int) -> None:
        self._stacks.clear()
        for name, whole in self._names.items():
            matrix = _matrix(whole.values)
            shapes = {"momentum": matrix.shape, "column": matrix.shape[-1:]}
            if matrix.ndim == 2:
                shapes["row"] = matrix.shape[:1]
            self._parts[whole] = {
                part: read(f"{part}:{name}", 0, math.prod(shape)).view(shape).to(whole.values.device)
                for part, shape in shapes.items()
            }
        for cut in self._cuts.values():
            cut.load(read)
        for group in self.param_groups:
            group["step"] = step

    def state_bytes(self) -> int:
        """What this rank keeps."""
        own = [part for parts in self._parts.values() for part in parts.values()]
        own += [piece.values for cut in self._cuts.values() for piece in cut.state()]
        return sum(part.numel() * part.element_size() for part in own)

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("AdaFactor's state is kept by parameter name: use state_of and load_state")

    def _in(self, tensor: Tensor) -> list[_Whole]:
        if tensor not in self._wholes:
            self._wholes[tensor] = [_Whole(tensor, tensor, 0)]
        return self._wholes[tensor]

    def _stack(self, parameters: list[_Whole]) -> _Stack:
        """The stacked state of these parameters; `_parts` holds views of it."""
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._stacks:
            # Another composition of the same parameters holds views that are about to become stale.
            self._stacks = {ids: stack for ids, stack in self._stacks.items() if not set(ids) & set(key)}
            shape = _matrix(parameters[0].values).shape
            row = self._stacked("row", parameters, shape[:-1]) if len(shape) == 2 else None
            column = self._stacked("column", parameters, shape[-1:])
            momentum = self._stacked("momentum", parameters, shape, self.momentum_dtype)
            self._stacks[key] = _Stack(parameters, momentum, row, column)
        return self._stacks[key]

    def _stacked(
        self, part: str, parameters: list[_Whole], shape: torch.Size, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        like = parameters[0].values
        held = [self._parts.setdefault(p, {}).get(part) for p in parameters]
        stacked = torch.stack([like.new_zeros(shape, dtype=dtype) if x is None else x.to(dtype) for x in held])
        for parameter, view in zip(parameters, stacked.unbind(), strict=True):
            self._parts[parameter][part] = view
        return stacked


def _norms(rows: Tensor) -> Tensor:
    norm = cast(Callable[..., Tensor], torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
    return norm(rows, dim=1)


def _matrix(tensor: Tensor) -> Tensor:
    """As the rule sees it: a matrix, or a vector."""
    return tensor.flatten(1) if tensor.ndim >= 2 else tensor.reshape(-1)


def _alike(parameters: Iterable[_Whole]) -> list[list[_Whole]]:
    """Parameters of one shape, type and device together, at most STACK_VALUES values a list."""
    lists: dict[object, list[list[_Whole]]] = {}
    for parameter in parameters:
        values = parameter.values
        alike = lists.setdefault((_matrix(values).shape, values.dtype, values.device), [[]])
        if (len(alike[-1]) + 1) * values.numel() > STACK_VALUES and alike[-1]:
            alike.append([])
        alike[-1].append(parameter)
    return [entry for alike in lists.values() for entry in alike]
