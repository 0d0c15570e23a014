"""STIV's layers: stateless norms, attention with QK-norm, the block, embedders. Shapes are noted where they change.

Plain PyTorch that exports; it knows nothing of training, masking or parallelism.
B batch, T token frames, S spatial tokens, N any sequence, L text tokens, D hidden size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.network import rope
from model.recipe import NetworkConfig

EXPLICIT_BELOW = 64
"""Sequences shorter than this use a written-out softmax: SDPA's backward over many tiny sequences is slow on CPU."""


def norm(x: Tensor) -> Tensor:
    """Stateless LayerNorm (no affine), as STIV uses before and after each sub-layer (paper 2.2)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: x [B, T, S, D], shift and scale [B, D]."""
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


class RMSNorm(nn.Module):
    """RMSNorm with a learnable scale, applied per head to queries and keys (QK-norm, paper 2.2)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Multi-head attention with QK-norm: self-attention, or cross-attention when `context` is given."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        head_size = hidden_size // num_heads
        self.query_norm = RMSNorm(head_size)
        self.key_norm = RMSNorm(head_size)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, angles: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D]; context [B, M, D]; angles [B or 1, N, head/2]; mask bool [B, M], True = attend."""
        source = x if context is None else context
        query = rearrange(self.query(x), "b n (h d) -> b n h d", h=self.num_heads)
        key, value = rearrange(self.key_value(source), "b m (two h d) -> two b m h d", two=2, h=self.num_heads)
        query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = rope.rotate(query, angles), rope.rotate(key, angles)
        out = _attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        return self.output(rearrange(out, "b h n d -> b n (h d)"))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    allowed = None if mask is None else mask[:, None, None, :]
    # An exported graph holds the written-out form: SDPA's is longer by nodes that find out shapes known here.
    if not torch.compiler.is_exporting() and (query.is_cuda or key.shape[-2] > EXPLICIT_BELOW):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1) @ value


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, ratio * hidden_size)
        self.down = nn.Linear(ratio * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Spatial attention, temporal attention, cross-attention to text, feed-forward; sandwich norms (paper 2.2)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_heads
        self.spatial = Attention(size, heads)
        self.temporal = Attention(size, heads) if config.temporal_attention else None
        self.cross = Attention(size, heads)
        self.feed_forward = FeedForward(size, config.mlp_ratio)

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        text: Tensor,
        text_mask: Tensor,
        spatial_angles: Tensor,
        temporal_angles: Tensor,
    ) -> Tensor:
        """x [B, T, S, D]; six modulation vectors [B, D]; text [B, L, D]; angles as `Attention`."""
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
        frames, tokens = x.shape[1], x.shape[2]

        h = rearrange(modulate(norm(x), shift_attention, scale_attention), "b t s d -> (b t) s d")
        h = norm(self.spatial(h, angles=spatial_angles))
        x = x + gate_attention[:, None, None] * rearrange(h, "(b t) s d -> b t s d", t=frames)

        if self.temporal is not None:
            h = rearrange(norm(x), "b t s d -> (b s) t d")
            h = norm(self.temporal(h, angles=temporal_angles))
            x = x + rearrange(h, "(b s) t d -> b t s d", s=tokens)

        h = self.cross(rearrange(x, "b t s d -> b (t s) d"), text, mask=text_mask)
        x = x + rearrange(h, "b (t s) d -> b t s d", t=frames)

        h = norm(self.feed_forward(modulate(norm(x), shift_mlp, scale_mlp)))
        return x + gate_mlp[:, None, None] * h


class ScalarEmbedder(nn.Module):
    """Sinusoid of each scalar, then an MLP over all of them: one condition vector a group (paper 2.1)."""

    FREQUENCIES = 128

    def __init__(self, scalars: int, hidden_size: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.hidden = nn.Linear(scalars * 2 * self.FREQUENCIES, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, values: Tensor) -> Tensor:
        """values [B, scalars] -> [B, D]."""
        # In double, so that every engine rounds to the same float32: phases go up to 1000, an ulp would show.
        exponent = torch.arange(self.FREQUENCIES, dtype=torch.float64, device=values.device) / self.FREQUENCIES
        phase = values.float()[..., None] * self.scale * (10000.0**-exponent).float()
        waves = torch.cat([phase.cos(), phase.sin()], dim=-1).flatten(1)
        return self.output(F.silu(self.hidden(waves)))


class TextProjection(nn.Module):
    """Two-layer MLP from the text encoder's width to the network's (PixArt's caption embedder)."""

    def __init__(self, text_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(text_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, text: Tensor) -> Tensor:
        return self.output(F.gelu(self.hidden(text)))


class FinalLayer(nn.Module):
    """Norm, its own AdaLN, and the linear head to patch values (velocity)."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.head = nn.Linear(hidden_size, patch_values)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.head(modulate(norm(x), shift, scale))
