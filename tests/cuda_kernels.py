"""A block on the meta device, run by the kernels that PyTorch picks on CUDA: its shapes, no arithmetic."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.config import NetworkConfig
from model.network.layers import Block, modulation_vectors

aten: Any = torch.ops.aten


class CudaRmsNorm(torch.autograd.Function):
    """CUDA's kernel keeps its input and one statistic a row; the meta device would write it out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class CudaAttention(TorchFunctionMode):
    """On the meta device: what PyTorch picks on CUDA, flash attention, and with a mask the memory-efficient one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        if (mask := kwargs.get("attn_mask")) is None:
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, kwargs["is_causal"])[0]
        bias = torch.zeros(mask.shape, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


class CudaKernels(CudaAttention):
    """And its kernel for RMSNorm, which a compiler would take apart again."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.rms_norm:
            return CudaRmsNorm.apply(args[0], (kwargs or {})["weight"])
        return super().__torch_function__(func, types, args, kwargs)


def block_and_inputs(
    config: NetworkConfig, dtype: torch.dtype, clips: int, grid: tuple[int, int], text: int
) -> tuple[Block, tuple[Any, ...]]:
    """Under `torch.device("meta")`; the first input is what the block before it gave."""
    frames, places = grid
    size, half = config.hidden_size, config.hidden_size // config.num_heads // 2
    vectors = modulation_vectors(config) if config.shared_modulation else 1
    x = torch.empty(clips, frames, places, size, dtype=dtype).requires_grad_()
    modulation = torch.empty(clips, vectors * size, dtype=dtype).requires_grad_()
    caption = torch.empty(clips, text, size, dtype=dtype).requires_grad_()
    mask = torch.ones(clips, text, dtype=torch.bool)
    spatial = (torch.empty(1, places, 1, half), torch.empty(1, places, 1, half))
    temporal = (torch.empty(1, frames, 1, half), torch.empty(1, frames, 1, half))
    return Block(config).to(dtype), (x, modulation, caption, mask, spatial, temporal)
