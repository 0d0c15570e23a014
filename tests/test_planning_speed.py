"""What the predicted time of a step rests on, held to what blocks and codecs run."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flows.catalog import recipe_path
from model.config import NetworkConfig
from model.network import layers
from model.planning import codec, speed
from model.recipe import load
from tests.cuda_kernels import CudaKernels, block_and_inputs

APART = ("mm", "attention", "empty", "zeros")
"""Matrix products and attention are counted elsewhere."""


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, but for views, and how many operations there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if func.is_view or "_unsafe_view" in name or "detach" in name:
            return result
        if "zeros" not in name and "empty" not in name:
            self.kernels += 1
        if "empty_like" in name or not any(part in name for part in APART):  # the stand-in for RMSNorm's kernel
            tensors = {(t.data_ptr(), id(t)): t for t in [*given, *tree_leaves(result)] if isinstance(t, Tensor)}
            self.bytes += sum(_moved(tensor) for tensor in tensors.values())
        return result


def _moved(tensor: Tensor) -> int:
    """A value that is spread over an axis is read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()


@pytest.mark.parametrize("over_time", [True, False])
@pytest.mark.parametrize(("precision", "kernels"), [("fp32", speed.WRITTEN_OUT), ("bf16", speed.SINGLE)])
def test_a_block_moves_what_the_prediction_says(
    precision: str, kernels: speed.Kernels, over_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "EXPLICIT_BELOW", 0)  # as on a GPU
    config = NetworkConfig(hidden_size=1152, depth=3, num_heads=18, temporal_attention=over_time)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    grid = (10, 256) if over_time else (1, 256)
    with torch.device("meta"):
        block, inputs = block_and_inputs(config, dtype, 8, grid, 77)
        with CudaKernels(), Traffic() as forward:
            result = block(*inputs)
        with Traffic() as backward:
            result.backward(torch.empty_like(result))
    value = inputs[0].numel() * dtype.itemsize
    for found, moved, started in (
        (forward, kernels.forward, kernels.started_forward),
        (backward, kernels.backward, kernels.started_backward),
    ):
        assert moved[over_time] == pytest.approx(found.bytes / value, rel=0.07)
        assert started[over_time] == pytest.approx(found.kernels, rel=0.1)


@pytest.mark.parametrize("size", [128, 256])
def test_the_codec_costs_what_torch_counts(size: int) -> None:
    from diffusers.models.autoencoders import autoencoder_kl

    make: Any = autoencoder_kl.AutoencoderKL
    with torch.device("meta"), torch.no_grad():
        network = make(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        with FlopCounterMode(display=False) as counter:
            network.encode(torch.empty(1, 3, size, size))
    recipe = load(recipe_path("xl"), [f"t2i_256.video.{side}={size}" for side in ("height", "width")]).stage("t2i_256")
    assert codec.encoding_flops(recipe) == counter.get_total_flops()
    assert codec.codec_bytes(recipe) == 4 * sum(parameter.numel() for parameter in network.parameters())
