"""Where a token stands: rotary angles of a grid of tokens, and positions that are added to tokens.

It owns the grid's coordinates, their interpolation and the learned table; `rope` does the rotation.
T token frames, S spatial tokens (rows x columns), D hidden size.
"""

import torch
from torch import Tensor, nn

from model.config import NetworkConfig
from model.network import rope


def spatial_angles(config: NetworkConfig, height: int, width: int, size: int, device: torch.device) -> Tensor:
    """[1, S, size / 2] for `size` channels."""
    scale, theta = config.rope_spatial_scale, config.rope_theta
    rows = (torch.arange(height, device=device) * scale)[:, None].expand(height, width)
    columns = (torch.arange(width, device=device) * scale)[None, :].expand(height, width)
    return rope.angles_2d(rows, columns, size, theta).reshape(1, height * width, -1)


def temporal_angles(config: NetworkConfig, frames: int, size: int, device: torch.device) -> Tensor:
    """[1, T, size / 2] for `size` channels."""
    positions = torch.arange(frames, device=device) * config.rope_temporal_scale
    return rope.angles_1d(positions, size, config.rope_theta)[None]


def sinusoids(config: NetworkConfig, frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Fixed absolute positions [1, T, S, D] of `rope_sinusoid`."""
    size = config.hidden_size
    spatial = rope.sinusoid(spatial_angles(config, height, width, size, device))
    temporal = rope.sinusoid(temporal_angles(config, frames, size, device))
    return spatial[:, None] + temporal[:, :, None]


class LearnedPositions(nn.Module):
    """Learned absolute positions: a vector a frame, a row and a column of the grid, summed."""

    def __init__(self, grid: tuple[int, int, int], hidden_size: int) -> None:
        super().__init__()
        frames, rows, columns = grid
        self.frames = nn.Parameter(torch.zeros(frames, hidden_size))
        self.rows = nn.Parameter(torch.zeros(rows, hidden_size))
        self.columns = nn.Parameter(torch.zeros(columns, hidden_size))

    def initialize(self) -> None:
        for table in self.parameters():
            nn.init.normal_(table, std=0.02)

    def forward(self, frames: int, height: int, width: int) -> Tensor:
        """[1, T, S, D] of the grid's first frames, rows and columns."""
        grid = (len(self.frames), len(self.rows), len(self.columns))
        # A traced size has no value to compare: there the lookup itself refuses what the table lacks.
        if not torch.compiler.is_exporting() and (frames > grid[0] or height > grid[1] or width > grid[2]):
            raise ValueError(
                f"{frames}x{height}x{width} token frames, rows and columns exceed network.learned_grid"
                f" {grid[0]}x{grid[1]}x{grid[2]}; give smaller latents, or train with a larger grid"
            )
        device = self.frames.device
        temporal = self.frames[torch.arange(frames, device=device)]
        rows, columns = self.rows[torch.arange(height, device=device)], self.columns[torch.arange(width, device=device)]
        spatial = (rows[:, None] + columns[None, :]).reshape(1, 1, height * width, -1)
        return temporal[None, :, None] + spatial
