"""How blocks run in training: which activations outlive their forward pass, and who compiles them.

The paper's gradient checkpointing (App. A 2.2) keeps self-attention's outputs alone, the dearest to compute and small
to keep; all else a block computes again in backward. It owns these two wrappers, which change no parameter's name and
no result; of what a block computes it knows only which kernels are attention.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from model.network.stiv import STIV

_aten = cast(Any, torch.ops.aten)
_checkpointing = cast(Any, torch.utils.checkpoint)
_Mode = cast(Any, TorchDispatchMode)
ATTENTIONS = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""What `scaled_dot_product_attention` becomes. Over few keys a CPU has attention written out, and computes it again:
its output would be no help in backward, which needs the softmax."""
GRAPHS = 64
"""Compiled graphs of a block: one a shape of clip, with and without masking."""


def recompute_blocks(network: STIV) -> None:
    """Keep of each block its input and its self-attentions' outputs. Before `compile_blocks`, which then sees it."""
    for block in network.blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: object) -> Tensor:
        # A block draws nothing at random, so there is no generator to put back.
        return _checkpointing.checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
        )

    return run


def _policy(context: object, operation: object, *args: Any, **kwargs: object) -> CheckpointPolicy:
    """Self-attention is told from cross-attention by as many queries as keys.

    A caption as long as what looks at it would be kept as well: more memory, the same result.
    """
    if operation in ATTENTIONS and args[0].shape[-2] == args[1].shape[-2]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> tuple[object, object]:
    """Of a block's forward pass, and of its computation again."""
    keep, replay = _checkpointing.create_selective_checkpoint_contexts(_policy)
    return keep, _Replay(replay)


class _Replay(_Mode):
    """Gives attention's kept outputs and computes all else.

    PyTorch's own wants every operation to come again as it came; where DeepSpeed cuts weights over ranks (ZeRO 3) it
    puts them together in between, and not the same ones each time.
    """

    def __init__(self, kept: Any) -> None:
        _Mode.__init__(self)
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTIONS:
            return self._kept.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def compile_blocks(network: STIV, backend: str = "inductor") -> None:
    """Run each block through torch.compile: one graph serves all blocks, as their weights are its inputs.

    A shape gets a graph of its own, with its sizes known. What cannot be compiled, and a shape too many, is an error.
    """
    torch.compiler.config.recompile_limit = GRAPHS
    for block in network.blocks:
        cast(Any, block).compile(backend=backend, fullgraph=True, dynamic=False)
