"""Ranks that share a clip: each keeps a part of its frames, and while attention runs along time a part of its places.

Almost all of STIV is per token or per frame, so only temporal attention needs others' tokens. Switching the axis that
is cut before and after it moves every token twice a block; DeepSpeed-Ulysses (arXiv 2309.14509), which cuts heads
around each attention, moves query, key, value and output, and ties the ranks to the number of heads. This is DSP's
observation (arXiv 2403.10266).

The module owns groups of ranks and what moves between them; it knows nothing of the network, and of training only
that gradients are averaged over all ranks.
B batch, T token frames, S spatial tokens (places), D hidden size, n ranks of a group.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_collectives = cast(Any, torch.distributed)
_Function = cast(Any, torch.autograd.Function)  # its own types know neither arguments nor results


@dataclass(slots=True, frozen=True)
class SequenceGroup:
    """The ranks that share a clip, and this rank's place among them.

    Every rank of a group is given the same clips, holds its part of them inside the network, and gets the whole
    result; the losses are then the same. Gradients must be averaged over all ranks, not over clips: what `gather`
    does in backward is made for that.
    """

    group: ProcessGroup | None
    """None is all ranks there are."""
    size: int
    rank: int
    """Within the group: it holds the `rank`-th part of the frames, and of the places."""

    @classmethod
    def join(cls, size: int, timeout: timedelta | None = None) -> Self:
        """The group of this rank when each `size` consecutive ranks, which sit on one node, share clips.

        Every rank calls it. Rank r then sees the clips of number r // size.
        """
        group, _ = _collectives.new_subgroups(group_size=size, timeout=timeout)
        return cls(group, size, _collectives.get_rank() % size)

    def scatter(self, x: Tensor) -> Tensor:
        """A clip's tokens [B, T, S, D], which every rank has -> own frames [B, T/n, S, D]."""
        self._check(x.shape[1], "token frames")
        return x.chunk(self.size, dim=1)[self.rank].clone()  # a view would keep the whole alive

    def to_places(self, x: Tensor) -> Tensor:
        """Own frames of all places [B, T/n, S, D] -> all frames of own places [B, T, S/n, D]."""
        self._check(x.shape[2], "tokens a frame")
        return self._switch(x, cut=2, join=1)

    def to_frames(self, x: Tensor) -> Tensor:
        """All frames of own places [B, T, S/n, D] -> own frames of all places [B, T/n, S, D]."""
        return self._switch(x, cut=1, join=2)

    def gather(self, x: Tensor) -> Tensor:
        """Own frames [B, T/n, ...] -> those of all ranks [B, T, ...], on every rank."""
        return torch.cat(_AllGather.apply(x, self).unbind(), dim=1)

    def _switch(self, x: Tensor, *, cut: int, join: int) -> Tensor:
        parts = torch.stack(x.chunk(self.size, dim=cut))
        return torch.cat(_AllToAll.apply(parts, self.group).unbind(), dim=join)

    def _check(self, count: int, what: str) -> None:
        if count % self.size:
            raise ValueError(
                f"{count} {what} cannot be shared evenly by {self.size} ranks; choose training.sequence_parallel and"
                " training.mask_ratio so that they divide"
            )


class _AllToAll(_Function):
    """Part i [n, ...] goes to rank i, and what rank i sent comes i-th. It is its own transpose, so its own backward."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        _collectives.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad.contiguous(), ctx.group), None


class _AllGather(_Function):
    """All ranks' x as [n, ...]; in backward its own part of the gradient, times n.

    All ranks compute the same loss, so each has the whole gradient of the result already and none needs to be added.
    A rank's parameters then see its own tokens alone; their gradients, n times too large, average to the clip's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: SequenceGroup) -> Tensor:
        ctx.ranks = ranks
        gathered = x.new_empty(ranks.size, *x.shape)
        _collectives.all_gather(list(gathered.unbind()), x.contiguous(), group=ranks.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.ranks.rank] * ctx.ranks.size, None
