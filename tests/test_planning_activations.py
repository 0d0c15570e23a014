"""A plan's activations against what autograd keeps: blocks run on the meta device in the form a GPU runs them in."""

import gc
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from model.config import NetworkConfig, TrainingConfig
from model.network import layers
from model.network.recompute import recompute_blocks
from model.network.stiv import STIV
from model.planning.activations import block_bytes, recomputed_block_bytes
from tests.cuda_kernels import CudaAttention, CudaKernels, block_and_inputs


def kept_by_autograd(config: NetworkConfig, dtype: torch.dtype, clips: int, grid: tuple[int, int], text: int) -> int:
    """Bytes that a block's forward pass leaves for backward, but for weights and what all blocks share."""
    with torch.device("meta"):
        block, inputs = block_and_inputs(config, dtype, clips, grid, text)
        _, modulation, caption, mask, spatial, temporal = inputs
        shared = [*block.parameters(), modulation, caption, mask, *spatial, *temporal]
        own = {tensor.untyped_storage()._cdata for tensor in shared}
        stored: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                stored[storage._cdata] = storage
            return tensor

        with CudaKernels(), saved_tensors_hooks(pack, lambda tensor: tensor):
            block(*inputs)
    return sum(storage.nbytes() for storage in stored.values())


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which writes no softmax out however few the keys."""
    monkeypatch.setattr(layers, "EXPLICIT_BELOW", 0)


def training(precision: str = "bf16", **more: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "precision": precision, **more}
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("choices", "clips", "grid", "text"),
    [
        ({}, 2, (10, 256), 77),
        ({}, 2, (10, 128), 77),  # half of the places masked
        ({}, 1, (20, 512), 77),
        ({"temporal_attention": False, "temporal_patch_size": 1}, 16, (1, 256), 77),
        ({"temporal_attention": False, "temporal_patch_size": 1}, 16, (1, 128), 77),
        ({"qk_norm": False}, 2, (10, 256), 77),
        ({"sandwich_norm": False}, 2, (10, 256), 77),
        ({"temporal_modulation": True}, 2, (10, 256), 77),
        ({"mlp_ratio": 2, "causal_temporal_attention": True}, 2, (10, 256), 77),
        ({"shared_modulation": False}, 2, (10, 256), 77),
        ({}, 2, (10, 256), 300),
    ],
)
def test_a_block_keeps_what_the_plan_says(
    precision: str, choices: dict[str, Any], clips: int, grid: tuple[int, int], text: int
) -> None:
    config = NetworkConfig.model_validate({"hidden_size": 1152, "depth": 3, "num_heads": 18, **choices})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    planned = block_bytes(config, training(precision), clips * grid[0] * grid[1], clips * text)
    assert planned == pytest.approx(kept_by_autograd(config, dtype, clips, grid, text), rel=0.02)


@pytest.mark.parametrize(
    "choices", [{}, {"temporal_attention": False, "temporal_patch_size": 1}], ids=["clips", "images"]
)
def test_a_compiled_block_keeps_what_the_plan_says(choices: dict[str, Any]) -> None:
    """What AOTAutograd's partition, which torch.compile uses, hands from forward to backward."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    config = NetworkConfig.model_validate({"hidden_size": 1152, "depth": 3, "num_heads": 18, **choices})
    frames, places, text = 1 if choices else 10, 256, 77
    graphs: list[torch.fx.GraphModule] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    with torch.device("meta"):
        block, (x, modulation, caption, mask, spatial, temporal) = block_and_inputs(
            config, torch.bfloat16, 2, (frames, places), text
        )
        names = [name for name, _ in block.named_parameters()]

        def run(weights: Sequence[Tensor], *inputs: Any) -> Tensor:
            with CudaAttention():
                return torch.func.functional_call(
                    block, dict(zip(names, weights, strict=True)), (*inputs[:4], inputs[4:6], inputs[6:])
                )

        compiled = aot_function(
            run,
            fw_compiler=cast(Any, compiler),
            bw_compiler=cast(Any, compiler),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        weights = [weight for _, weight in block.named_parameters()]
        compiled(weights, x, modulation, caption, mask, *spatial, *temporal)

    nodes = list(graphs[0].graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    kept = {}
    for node in nodes[-1].args[0][1:]:
        while "permute" in node.name or "alias" in node.name or "view" in node.name:  # no bytes of its own
            node = node.all_input_nodes[0]
        if node not in given or node is given[len(names)]:
            kept[node] = node.meta["val"]
    held = sum(value.numel() * value.element_size() for value in kept.values() if isinstance(value, Tensor))
    planned = block_bytes(config, training(compile=True), 2 * frames * places, 2 * text)
    assert planned == pytest.approx(held, rel=0.05)


def live_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter) and found.device.type == "meta":
            storage = found.untyped_storage()
            storages[storage._cdata] = storage
    return sum(storage.nbytes() for storage in storages.values())


def kept_recomputing(depth: int, frames: int) -> int:
    """Bytes that a forward pass of two clips leaves where blocks are computed again."""
    temporal = {"temporal_attention": frames > 1, "temporal_patch_size": 2 if frames > 1 else 1}
    config = NetworkConfig.model_validate({"hidden_size": 384, "depth": depth, "num_heads": 6, **temporal})
    with torch.device("meta"):
        network = STIV(config, latent_channels=4, text_size=64, pooled_size=64).to(torch.bfloat16)
        recompute_blocks(network)
        clips = torch.empty(2, frames * config.temporal_patch_size, 4, 32, 32)
        mask = torch.ones(2, 20, dtype=torch.bool)
        inputs = clips, torch.empty(2), torch.empty(2, 20, 64), mask, torch.empty(2, 64), torch.empty(2, 6)
        before = live_bytes()
        with CudaKernels():
            velocity = network(*inputs)
        return live_bytes() - before - velocity.untyped_storage().nbytes()


@pytest.mark.parametrize("frames", [10, 1])
def test_a_recomputed_block_keeps_its_input_and_what_self_attention_gave(frames: int) -> None:
    config = NetworkConfig(hidden_size=384, depth=3, num_heads=6, temporal_attention=frames > 1)
    per_block = (kept_recomputing(11, frames) - kept_recomputing(3, frames)) / 8
    assert recomputed_block_bytes(config, training(), 2 * frames * 256) == pytest.approx(per_block, rel=0.03)
