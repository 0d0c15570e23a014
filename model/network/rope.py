"""Rotary position embedding in real arithmetic: 2-D for spatial attention, 1-D for temporal attention.

It owns angles and the rotation; it knows nothing of attention. Half-split ("rotate half") layout: channel i and
channel i + n/2 of a head form one rotated pair, which exports as two slices and one concat.
"""

import torch
from torch import Tensor

Turn = tuple[Tensor, Tensor]
"""Cosines and sines [B or 1, N, 1, size // 2] of angles: one computation for all heads and all blocks."""


def angles_1d(positions: Tensor, size: int, theta: float) -> Tensor:
    """Angles [..., size // 2] of `positions` [...] for a head slice of `size` channels."""
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    return positions.float()[..., None] * (theta**-exponent)


def angles_2d(rows: Tensor, columns: Tensor, size: int, theta: float) -> Tensor:
    """Angles [..., size // 2]: half of the pairs turn with the row, half with the column (Unified-IO 2, B.2)."""
    return torch.cat([angles_1d(rows, size // 2, theta), angles_1d(columns, size // 2, theta)], dim=-1)


def turn(angles: Tensor) -> Turn:
    """Of `angles` [B or 1, N, size // 2]."""
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Rotate heads x [B, N, heads, size], in the precision of the turn if that is the finer one."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def sinusoid(angles: Tensor) -> Tensor:
    """Angles [..., n] as absolute position channels [..., 2n]."""
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
