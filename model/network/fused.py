"""The same layers in fewer passes over memory and with less kept for backward: what training on a CPU runs.

Element by element, a CPU is bound by memory, and autograd keeps what each operation took. Here backward is written out:
a norm keeps its output, QK-norm and RoPE are one function, and the feed-forward computes GELU again. A compiler fuses
the plain form by itself, so a graph that is compiled or exported holds that. This module knows nothing of the network.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.network.rope import Turn

EPSILON = 1e-6
"""Of every norm."""
_native = cast(Any, torch.ops.aten)
_Function = cast(Any, torch.autograd.Function)  # its own types know neither arguments nor results


def applies_to(x: Tensor) -> bool:
    if x.dtype == torch.bfloat16:  # what is written out here rounds at every step, PyTorch's kernels at their end
        return False
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


def norm(x: Tensor) -> Tensor:
    """LayerNorm without affine over the last axis. Its output is kept, as what follows keeps it as well."""
    return _Norm.apply(x)


def head_norm(x: Tensor, weight: Tensor, turn: Turn | None) -> Tensor:
    """RMSNorm of each head, x [B, N, H, size], times `weight` [size]; then RoPE if there is a `turn`."""
    return _HeadNorm.apply(x, weight, *(turn or (None, None)))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of GELU(x). GELU's output, the widest tensor there is, is computed again in backward."""
    return _GeluLinear.apply(x, weight, bias)


class _Norm(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = x.shape[-1]
        # Without a weight and a bias PyTorch's kernel takes nearly twice as long.
        out, _, rstd = _native.native_layer_norm(x, [size], x.new_ones(size), x.new_zeros(size), EPSILON)
        ctx.save_for_backward(out, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out, rstd = ctx.saved_tensors
        mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)  # the output's own
        size, wanted = [out.shape[-1]], [True, False, False]
        grad = _native.native_layer_norm_backward(grad.contiguous(), out, size, mean, one, None, None, wanted)[0]
        return grad.mul_(rstd)


class _HeadNorm(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        size, half = x.shape[-1], x.shape[-1] // 2
        inverse: Tensor = _native.linalg_vector_norm(x, 2, [-1], True).square_().div_(size).add_(EPSILON).rsqrt_()
        ctx.save_for_backward(x, weight, inverse, cos, sin)
        unit = x * inverse
        if cos is None or sin is None:
            return unit.mul_(weight)
        out = unit * (torch.cat([cos, cos], dim=-1) * weight)
        out[..., :half].addcmul_(unit[..., half:], sin * weight[half:], value=-1)
        out[..., half:].addcmul_(unit[..., :half], sin * weight[:half])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse, cos, sin = ctx.saved_tensors
        size, half = x.shape[-1], x.shape[-1] // 2
        if cos is not None:  # turn it back
            turned = torch.mul(grad, torch.cat([cos, cos], dim=-1), out=grad.new_empty(x.shape))
            turned[..., :half].addcmul_(grad[..., half:], sin)
            turned[..., half:].addcmul_(grad[..., :half], sin, value=-1)
            grad = turned
        unit = x * inverse
        product = unit * grad
        grad_x = grad * weight
        grad_x.addcmul_(unit, (product @ weight).div_(size)[..., None], value=-1)
        return grad_x.mul_(inverse), product.sum((0, 1, 2)), None, None


class _GeluLinear(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = rows.t() @ F.gelu(x).flatten(0, -2)
        return _native.gelu_backward(grad @ weight, x), grad_weight, rows.sum(0)
