"""The fused functions are the plain layers, in their gradients too, and keep less."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import NetworkConfig
from model.network import fused, rope
from model.network.layers import Block


def draw(*shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    ).requires_grad_()


def plain_head_norm(x: Tensor, weight: Tensor, turn: rope.Turn | None) -> Tensor:
    x = F.rms_norm(x, x.shape[-1:], weight, eps=fused.EPSILON)
    return x if turn is None else rope.rotate(x, turn)


TURNS = {"no": None, "a shared": rope.turn(draw(1, 5, 4).detach()), "its own": rope.turn(draw(2, 5, 4).detach())}
PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "norm": (fused.norm, lambda x: F.layer_norm(x, (8,), eps=fused.EPSILON), [draw(2, 3, 5, 8)]),
    "norm of a view": (
        lambda x: fused.norm(x.transpose(1, 2)),
        lambda x: F.layer_norm(x.transpose(1, 2), (8,), eps=fused.EPSILON),
        [draw(2, 3, 5, 8)],
    ),
    "gelu": (fused.gelu_linear, lambda x, w, b: F.linear(F.gelu(x), w, b), [draw(2, 3, 8), draw(4, 8), draw(4)]),
}
PAIRS |= {
    f"head norm, {name} turn": (
        lambda x, w, turn=turn: fused.head_norm(x, w, turn),
        lambda x, w, turn=turn: plain_head_norm(x, w, turn),
        [draw(2, 5, 3, 8), draw(8)],
    )
    for name, turn in TURNS.items()
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_fused_function_is_the_plain_one(name: str) -> None:
    function, plain, inputs = PAIRS[name]
    torch.testing.assert_close(function(*inputs), plain(*inputs), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(function, inputs)


def test_a_block_keeps_thirty_tensors_of_tokens_for_backward() -> None:
    block = Block(NetworkConfig(hidden_size=64, depth=3, num_heads=2, unmasked_depth=1))
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x, text = torch.randn(1, 8, 100, 64).requires_grad_(), torch.randn(1, 3, 64)
    turns = rope.turn(torch.randn(1, 100, 16)), rope.turn(torch.randn(1, 8, 16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, torch.randn(1, 6 * 64, requires_grad=True), text, torch.ones(1, 3, dtype=torch.bool), *turns)
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    assert 25 < size / (4 * x.numel()) < 33
