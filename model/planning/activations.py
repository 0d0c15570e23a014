"""What a rank keeps of a micro-batch between its forward and its backward pass, counted from shapes.

The tables say how many values of the network's width a block keeps of every token, as a GPU runs it: with PyTorch's own
kernels, one by one or through torch.compile, which keeps only what is dear to compute again. They hold for the layers
as `network.layers` writes them; a test counts what autograd keeps and holds them to it. The module knows nothing of
weights or of time.
"""

from dataclasses import dataclass
from math import prod

from model.config import NetworkConfig, TrainingConfig
from model.planning.phase import Phase, latents_of

LOGSUMEXP = STATISTIC = 4
"""Bytes: fp32, one a head and query of every attention; a norm keeps a mean and a deviation of every token."""
LOSS_COPIES = 8
"""Clean, noise, noisy, target, velocity, and what the squared error is made of."""


@dataclass(frozen=True, slots=True)
class _Form:
    """Values of the network's width that a block keeps of a token, in the paper's form."""

    spatial: float
    temporal: float
    cross: float
    mlp: float
    """Beside the two widened ones, before and after GELU."""
    query_norm: float
    """Of `spatial` and of `temporal`: what QK-norm adds to them; `cross_norm` the same of `cross`."""
    cross_norm: float
    sandwich: float
    """What the post-norms of a block's sub-layers add, by sub-layer that has one."""
    context: float
    """Of a token that cross-attention looks at."""
    context_norm: float


_WRITTEN_OUT = _Form(13, 11, 5, 5, query_norm=3, cross_norm=2, sandwich=1, context=4, context_norm=2)
"""fp32: input, normed and modulated; query, key and value as projected, of unit size and turned; attention's output,
projected and normed. Time is not modulated and needs no gate; cross-attention has no norm of its own."""
_KERNELS = _Form(11, 9, 4, 5, query_norm=1, cross_norm=1, sandwich=1, context=3, context_norm=1)
"""bf16: a kernel norms queries and keys and keeps what it was given."""
_COMPILED = _Form(9, 8, 4, 3, query_norm=1, cross_norm=1, sandwich=0, context=3, context_norm=1)
"""What a matrix product or an attention takes and gives, and each sub-layer's input; all else is computed again."""


def kept_bytes(phase: Phase, training: TrainingConfig) -> int:
    """Of a micro-batch on one rank, at the end of its forward pass."""
    network, context = phase.recipe.network, _context(phase, training)
    kept = _ends_bytes(phase, training)
    for count, grid in phase.blocks:
        tokens = _tokens(training, grid)
        if training.activation_checkpointing:
            kept += count * recomputed_block_bytes(network, training, tokens)
        else:
            kept += count * block_bytes(network, training, tokens, context)
    return round(kept)


def working_bytes(phase: Phase, training: TrainingConfig) -> int:
    """What backward of one block takes on top: gradients of its widest tensors, and all it computes again."""
    network = phase.recipe.network
    tokens = max(_tokens(training, grid) for count, grid in phase.blocks if count)
    gradients = tokens * network.hidden_size * itemsize(training) * (2 * network.mlp_ratio + 3)
    again = block_bytes(network, training, tokens, _context(phase, training))
    return round(gradients + (again if training.activation_checkpointing else 0))


def block_bytes(network: NetworkConfig, training: TrainingConfig, tokens: float, context: float) -> float:
    """What a block keeps of a rank's `tokens`, and of the `context` tokens that they look at."""
    form = _form(training)
    values = form.spatial + form.cross + form.mlp + 2 * network.mlp_ratio
    selves = 1
    if network.temporal_attention:
        values += form.temporal
        selves = 2
    normed = selves + 1  # self-attentions and the MLP take a normed input, and with sandwich norms give one
    around = form.context
    if not network.qk_norm:
        values -= selves * form.query_norm + form.cross_norm
        around -= form.context_norm
    if network.sandwich_norm:
        normed *= 2
    else:
        values -= normed * form.sandwich
    if network.temporal_modulation:
        values += 2
    width = network.hidden_size * itemsize(training)
    small = normed * 2 * STATISTIC + (selves + 1) * network.num_heads * LOGSUMEXP
    if network.qk_norm:  # one a head of each query and key
        small += (2 * selves + 1) * network.num_heads * STATISTIC
    return tokens * (values * width + small) + context * around * width


def recomputed_block_bytes(network: NetworkConfig, training: TrainingConfig, tokens: float) -> float:
    """The same of a block that is computed again: its input and what its self-attentions gave."""
    outputs = 2 if network.temporal_attention else 1
    width = network.hidden_size * itemsize(training)
    return tokens * ((1 + outputs) * width + outputs * network.num_heads * LOGSUMEXP)


def itemsize(training: TrainingConfig) -> int:
    return 2 if training.precision == "bf16" else 4


def _form(training: TrainingConfig) -> _Form:
    if training.compile:
        return _COMPILED
    return _KERNELS if training.precision == "bf16" else _WRITTEN_OUT


def _tokens(training: TrainingConfig, grid: tuple[int, int]) -> float:
    """Of a micro-batch on one rank; ranks that share a clip hold a part of each."""
    return training.micro_batch_size * grid[0] * grid[1] / training.sequence_parallel


def _context(phase: Phase, training: TrainingConfig) -> int:
    """Every rank that shares a clip has its whole caption."""
    return training.micro_batch_size * phase.context


def _ends_bytes(phase: Phase, training: TrainingConfig) -> float:
    """Embedding and head, RoPE's tables of kept places, the caption's projection, and the loss in fp32."""
    network = phase.recipe.network
    width = network.hidden_size * itemsize(training)
    whole = _tokens(training, phase.grid)
    loss = LOSS_COPIES * 4 * training.micro_batch_size * prod(latents_of(phase.recipe))
    turns = 0
    if phase.mask_ratio and network.positions != "learned":
        turns = 4 * _tokens(training, phase.kept_grid) * network.hidden_size // network.num_heads
    return 5 * whole * width + turns + 4 * _context(phase, training) * width + loss
