"""STIV's layers: stateless norms, attention with QK-norm, the block, embedders. Shapes are noted where they change.

Plain PyTorch that exports, and on a CPU the same in fewer passes (`fused`); it knows nothing of training, masking or
parallelism, but that a block asks `sequence` for the tokens that other ranks hold.
B batch, T token frames, S spatial tokens, N any sequence, L text tokens, D hidden size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import NetworkConfig
from model.network import fused, rope
from model.network.rope import Turn
from model.network.sequence import SequenceGroup

EXPLICIT_BELOW = 64
"""Sequences shorter than this use a written-out softmax: SDPA's backward over many tiny sequences is slow on CPU."""


def norm(x: Tensor) -> Tensor:
    """Stateless LayerNorm (no affine), as STIV uses before and after each sub-layer (paper 2.2)."""
    if fused.applies_to(x):
        return fused.norm(x)
    return F.layer_norm(x, x.shape[-1:], eps=fused.EPSILON)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: x [B, T, S, D], shift and scale [B, D]."""
    return torch.addcmul(shift[:, None, None], x, 1 + scale[:, None, None])


class RMSNorm(nn.Module):
    """RMSNorm with a learnable scale, applied per head to queries and keys (QK-norm, paper 2.2), then RoPE."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, turn: Turn | None) -> Tensor:
        """x [B, N, heads, size]."""
        if fused.applies_to(x):
            return fused.head_norm(x, self.weight, turn)
        if (
            x.dtype == self.weight.dtype == torch.bfloat16
        ):  # this kernel works in float32; written out, its steps would round
            x = F.rms_norm(x, x.shape[-1:], self.weight, fused.EPSILON)
            return x if turn is None else rope.rotate(x, turn)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + fused.EPSILON) * self.weight
        return x if turn is None else rope.rotate(x, turn)


class Attention(nn.Module):
    """Multi-head attention with QK-norm: self-attention, or cross-attention when `context` is given."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        head_size = hidden_size // num_heads
        self.query_norm = RMSNorm(head_size) if qk_norm else None
        self.key_norm = RMSNorm(head_size) if qk_norm else None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, turn: Turn | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D]; context [B, M, D]; turn of RoPE; mask bool [B, M], True = attend."""
        source = x if context is None else context
        query = rearrange(self.query(x), "b n (h d) -> b n h d", h=self.num_heads)
        key, value = rearrange(self.key_value(source), "b m (two h d) -> two b m h d", two=2, h=self.num_heads)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query, turn), self.key_norm(key, turn)
        elif turn is not None:
            query, key = rope.rotate(query, turn), rope.rotate(key, turn)
        out = _attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, causal=self.causal)
        return self.output(rearrange(out, "b h n d -> b n (h d)"))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    allowed = None if mask is None else mask[:, None, None, :]
    # An exported graph holds the written-out form: SDPA's is longer by nodes that find out shapes known here.
    if not torch.compiler.is_exporting() and (query.is_cuda or key.shape[-2] > EXPLICIT_BELOW):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=causal)
    logits = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if causal:
        place = torch.arange(key.shape[-2], device=key.device)
        allowed = place[:, None] >= place
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1) @ value


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, ratio * hidden_size)
        self.down = nn.Linear(ratio * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if fused.applies_to(x):
            return fused.gelu_linear(x, self.down.weight, self.down.bias)
        return self.down(F.gelu(x))


def modulation_vectors(config: NetworkConfig) -> int:
    """Vectors AdaLN gives a block: shift, scale and gate of spatial attention, of the MLP, and if asked for of time."""
    return 9 if config.temporal_modulation else 6


class Block(nn.Module):
    """Spatial attention, temporal attention, cross-attention to text, feed-forward; sandwich norms (paper 2.2)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        size, heads, qk_norm = config.hidden_size, config.num_heads, config.qk_norm
        causal = config.causal_temporal_attention
        vectors = modulation_vectors(config)
        self.sequence: SequenceGroup | None = None  # of ranks that share a clip; see STIV.share_clips
        self.modulation = None if config.shared_modulation else nn.Linear(size, vectors * size)
        self.spatial = Attention(size, heads, qk_norm=qk_norm)
        self.temporal = Attention(size, heads, qk_norm=qk_norm, causal=causal) if config.temporal_attention else None
        self.cross = Attention(size, heads, qk_norm=qk_norm)
        self.feed_forward = FeedForward(size, config.mlp_ratio)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        text_mask: Tensor,
        spatial_turn: Turn | None,
        temporal_turn: Turn | None,
    ) -> Tensor:
        """x [B, T, S, D]; modulation [B, 6D or 9D], or [B, D] for the block's own AdaLN; text [B, L, D]; turns of
        RoPE."""
        if self.modulation is not None:
            modulation = self.modulation(modulation)
        vectors = modulation.chunk(modulation_vectors(self.config), dim=-1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = vectors[:6]
        frames = x.shape[1]

        h = rearrange(modulate(norm(x), shift_attention, scale_attention), "b t s d -> (b t) s d")
        h = self._post_norm(self.spatial(h, turn=spatial_turn))
        x = torch.addcmul(x, rearrange(h, "(b t) s d -> b t s d", t=frames), gate_attention[:, None, None])

        if self.temporal is not None:
            h = x if self.sequence is None else self.sequence.to_places(x)
            h = self._through_time(self.temporal, h, vectors[6:], temporal_turn)
            x = x + (h if self.sequence is None else self.sequence.to_frames(h))

        h = self.cross(rearrange(x, "b t s d -> b (t s) d"), text, mask=text_mask)
        x = x + rearrange(h, "b (t s) d -> b t s d", t=frames)

        h = self._post_norm(self.feed_forward(modulate(norm(x), shift_mlp, scale_mlp)))
        return torch.addcmul(x, h, gate_mlp[:, None, None])

    def _through_time(self, attention: Attention, x: Tensor, vectors: tuple[Tensor, ...], turn: Turn | None) -> Tensor:
        """What temporal attention adds to x [B, T, S, D], which has all frames; `vectors` are its own of AdaLN."""
        h = norm(x.transpose(1, 2))  # moved before the norm, which copies anyway
        if self.config.temporal_modulation:
            h = modulate(h, shift=vectors[0], scale=vectors[1])
        h = self._post_norm(attention(rearrange(h, "b s t d -> (b s) t d"), turn=turn))
        h = rearrange(h, "(b s) t d -> b t s d", s=x.shape[2])
        return vectors[2][:, None, None] * h if self.config.temporal_modulation else h

    def _post_norm(self, h: Tensor) -> Tensor:
        return norm(h) if self.config.sandwich_norm else h

    def closed(self) -> list[nn.Linear]:
        """What must start at zero for a branch to start closed.

        AdaLN's gates close spatial attention and the MLP. Cross-attention has neither gate nor norm and starts with a
        zero output; so does temporal attention where nothing follows it. With a post-norm it starts open: the norm
        would blow up the first step away from zero. Behind a zero gate no gradient would ever move a zero output.
        """
        own = [] if self.modulation is None else [self.modulation]
        bare = not (self.config.sandwich_norm or self.config.temporal_modulation)
        return [*own, self.cross.output, *([self.temporal.output] if self.temporal is not None and bare else [])]


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
        return self.output(F.silu(self.hidden(waves.to(self.hidden.weight.dtype))))


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
