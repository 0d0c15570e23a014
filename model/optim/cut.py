"""AdaFactor's step of parameters that a partition's border cuts, so that ranks hold a run of their values each.

Row and column sums of the squared gradient and the update's norm are added up over the ranks: R + C + 1 numbers a cut
parameter, of which there is at most one a border. It owns that exchange; it knows nothing of whole parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from model.optim.fragment import Fragment
from model.optim.optimizer import ReadState, offset_in
from model.optim.rule import EPSILON, Rule

dist = cast(Any, torch.distributed)  # half of its signatures are untyped

Named = tuple[str, torch.Size]
"""A parameter's name and shape."""


def agree(cut: Sequence[Fragment], group: ProcessGroup | None) -> list[Named]:
    """What is cut on any rank of the group, in one order on all of them; collective."""
    if group is None:
        if cut:
            raise ValueError(f"'{cut[0].name}' is cut, and no process group holds its other runs")
        return []
    lists: list[list[Named]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(lists, [(run.name, run.shape) for run in cut], group)
    return list(dict.fromkeys(named for ranks in lists for named in ranks))


@dataclass(slots=True, frozen=True, eq=False)
class _Run:
    """This rank's run of a cut parameter, and its state."""

    held: Fragment
    offset: int
    """In the flat tensor that the run is a view of."""
    place: int
    """In the list that the ranks agree on."""
    momentum: Tensor
    row: Tensor | None
    """[R], the whole parameter's on every rank that holds a run of it; None for vectors."""
    column: Tensor
    """[C], likewise; a vector's second moment, of this run."""

    def lines(self, values: Tensor) -> tuple[slice, Tensor]:
        """The matrix rows that the run touches, and `values` [numel] in them [rows, C], zeros around."""
        columns = self.column.numel()
        first, last = self.held.start // columns, (self.held.stop - 1) // columns
        padded = values.new_zeros((last + 1 - first) * columns)
        padded[self.held.start - first * columns :][: values.numel()] = values
        return slice(first, last + 1), padded.view(-1, columns)

    def flat(self, lines: Tensor) -> Tensor:
        """Back from `lines`."""
        begin = self.held.start % self.column.numel()
        return lines.reshape(-1)[begin : begin + self.held.values.numel()]


class CutParameters:
    """The cut parameters of one flat tensor."""

    def __init__(
        self,
        tensor: Tensor,
        cut: Sequence[Fragment],
        everywhere: Sequence[Named],
        group: ProcessGroup | None,
        momentum_dtype: torch.dtype,
    ) -> None:
        self.tensor = tensor
        self.group = group
        sizes = [_factors(shape) for _, shape in everywhere]
        ends = list(accumulate((rows + columns for rows, columns in sizes), initial=0))
        self._slices = [
            (slice(begin, begin + rows), slice(begin + rows, begin + rows + columns))
            for begin, (rows, columns) in zip(ends[:-1], sizes, strict=True)
        ]
        self._numbers = ends[-1]
        self._count = len(everywhere)
        places = {name: place for place, (name, _) in enumerate(everywhere)}
        self._runs: list[_Run] = []
        for held in cut:
            rows, columns = _factors(held.shape)
            zeros = held.values.new_zeros
            run = _Run(
                held=held,
                offset=offset_in(tensor, held),
                place=places[held.name],
                momentum=zeros(held.values.numel(), dtype=momentum_dtype),
                row=zeros(rows) if rows else None,
                column=zeros(columns or held.values.numel()),
            )
            self._runs.append(run)

    def step(self, rule: Rule) -> None:
        """Collective: every rank calls it, whether or not it holds a run."""
        gradients = [self._gradient(run) for run in self._runs]
        sums = self.tensor.new_zeros(self._numbers)
        for run, gradient in zip(self._runs, gradients, strict=True):
            if run.row is not None:
                lines, square = run.lines(gradient.square().add_(EPSILON))
                rows, columns = self._slices[run.place]
                sums[rows][lines] = square.sum(1)
                sums[columns] = square.sum(0)
        if self._numbers:
            dist.all_reduce(sums, group=self.group)
        updates = [
            self._update(run, gradient, sums, rule.beta2) for run, gradient in zip(self._runs, gradients, strict=True)
        ]
        squares = self.tensor.new_zeros(self._count)
        for run, update in zip(self._runs, updates, strict=True):
            squares[run.place] = update.square().sum()
        dist.all_reduce(squares, group=self.group)
        for run, update in zip(self._runs, updates, strict=True):
            rms = (squares[run.place] / math.prod(run.held.shape)).sqrt()
            scale = rule.lr * (1 - rule.beta1) / (rms / rule.clip_threshold).clamp_min(1.0)
            run.held.values.sub_(rule.accumulate(run.momentum, update, scale))

    def state(self) -> list[Fragment]:
        pieces: list[Fragment] = []
        for run in self._runs:
            held = run.held
            pieces.append(Fragment(f"momentum:{held.name}", held.shape, held.start, run.momentum))
            if run.row is None:
                pieces.append(Fragment(f"column:{held.name}", held.shape, held.start, run.column))
            elif held.start == 0:
                pieces += [
                    Fragment(f"{part}:{held.name}", x.shape, 0, x)
                    for part, x in (("row", run.row), ("column", run.column))
                ]
        return pieces

    def load(self, read: ReadState) -> None:
        for run in self._runs:
            held = run.held
            run.momentum.copy_(read(f"momentum:{held.name}", held.start, held.stop))
            if run.row is None:
                run.column.copy_(read(f"column:{held.name}", held.start, held.stop))
            else:
                run.row.copy_(read(f"row:{held.name}", 0, run.row.numel()))
                run.column.copy_(read(f"column:{held.name}", 0, run.column.numel()))

    def _gradient(self, run: _Run) -> Tensor:
        gradient = self.tensor.grad
        if gradient is None:
            return torch.zeros_like(run.held.values)
        return gradient.reshape(-1)[run.offset : run.offset + run.held.values.numel()]

    def _update(self, run: _Run, gradient: Tensor, sums: Tensor, beta2: float) -> Tensor:
        """The run of the normalised gradient, before its clip; takes the sums into the state."""
        if run.row is None:
            run.column.lerp_(gradient.square().add_(EPSILON), 1 - beta2)
            return gradient * run.column.rsqrt()
        rows, columns = self._slices[run.place]
        run.row.lerp_(sums[rows] / run.column.numel(), 1 - beta2)
        run.column.lerp_(sums[columns] / run.row.numel(), 1 - beta2)
        lines, update = run.lines(gradient)
        update.mul_((run.row / run.row.mean()).rsqrt_()[lines, None])
        update.mul_(run.column.rsqrt()[None, :])
        return run.flat(update)


def _factors(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of the parameter as a matrix; none of a vector."""
    return (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (0, 0)
