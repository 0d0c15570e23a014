"""Memory that training takes of a rank, part by part, for the layout that a recipe's `training` section names.

It owns what the engine (`training.parallel`) keeps on a device; what a forward pass keeps is `activations`'. It is
arithmetic on shapes and knows nothing of time, or of which layout would be a better one.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from model.config import NetworkConfig, TrainingConfig
from model.network.stiv import STIV
from model.planning import activations, codec
from model.planning.gpu import GIB, Gpu
from model.planning.phase import Phase, phases, text_widths
from model.recipe import StageRecipe

FP32 = 4
GROUP_VALUES = 1 << 28
"""Values that the engine reduces, and copies to fp32 while it steps, at a time (`parallel.GROUP_VALUES`)."""
REDUCED = 500_000_000
"""Values that DeepSpeed reduces at a time at stage 0, in a copy."""
GATHERED = 1_000_000_000
"""Parameters that ZeRO 3 lets live whole at once (DeepSpeed's `stage3_max_live_parameters`)."""
CONTEXT = 2 * GIB
"""Taken by CUDA, cuBLAS and NCCL, outside of what PyTorch counts."""
FRAGMENTATION = 0.03
"""Of the memory, which the allocator holds in pieces that fit nothing."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank. The first parts stay; of the last three one is there at a time."""

    weights: int
    gradients: int
    masters: int
    momentum: int
    second_moment: int
    """AdaFactor's rows and columns, or AdamW's second moment."""
    average: int
    """EMA: each rank keeps its share, whatever the stage of ZeRO."""
    codec: int
    encoding: int
    """For a moment, before the network runs."""
    activations: int
    """At the end of a forward pass; with them what backward of the first block takes, and gradients being reduced."""
    stepping: int
    """Gradients being turned into fp32 and the update, while the optimizer steps."""

    @property
    def resident(self) -> int:
        parts = asdict(self)
        return sum(size for part, size in parts.items() if part not in PASSING)

    @property
    def peak(self) -> int:
        """The most there is at any time, of what PyTorch allocates."""
        return self.resident + max(self.encoding, self.activations, self.stepping)


PASSING = ("encoding", "activations", "stepping")
"""Parts of which one is there at a time."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Of a network, in values."""

    total: int
    largest: int
    factors: int
    """AdaFactor keeps a row and a column of a matrix, and a vector whole."""


def usable(gpu: Gpu) -> int:
    """Bytes of a card that allocations can fill."""
    return int(gpu.memory * (1 - FRAGMENTATION)) - CONTEXT


def memory(recipe: StageRecipe) -> Memory:
    """Of the phase that takes the most."""
    training = recipe.training
    size = parameters(recipe)
    ranks = training.world_size
    kept = size.total if training.zero_stage == 0 else size.total / ranks  # of masters and optimizer state
    adamw = recipe.optimizer.type == "adamw"
    momentum = 2 if recipe.optimizer.momentum == "bf16" and not adamw else FP32
    factors = size.factors if training.zero_stage == 0 else size.factors / ranks
    return Memory(
        weights=_weight_bytes(training, size),
        gradients=round(_gradient_bytes(training) * size.total),
        masters=0 if _is_plain(training) else round(FP32 * kept),
        momentum=round(momentum * kept),
        second_moment=round(FP32 * (kept if adamw else factors)),
        average=round(FP32 * size.total / ranks),
        codec=codec.codec_bytes(recipe),
        encoding=codec.encoding_bytes(recipe, training.micro_batch_size),
        activations=max(_activation_bytes(phase, size) for phase in phases(recipe)),
        stepping=round(_stepping_bytes(training, size, adamw=adamw)),
    )


def parameters(recipe: StageRecipe) -> Parameters:
    text, pooled = text_widths(recipe)
    return _parameters(recipe.network.model_dump_json(), recipe.vae.latent_channels, text, pooled)


@lru_cache(maxsize=64)
def _parameters(network_json: str, latent_channels: int, text: int, pooled: int) -> Parameters:
    config = NetworkConfig.model_validate_json(network_json)
    with torch.device("meta"):
        network = STIV(config, latent_channels=latent_channels, text_size=text, pooled_size=pooled)
    sizes = [parameter.numel() for parameter in network.parameters()]
    factors = [p.shape[0] + p.numel() // p.shape[0] if p.ndim >= 2 else p.numel() for p in network.parameters()]
    return Parameters(sum(sizes), max(sizes), sum(factors))


def _weight_bytes(training: TrainingConfig, size: Parameters) -> int:
    own = activations.itemsize(training)
    if training.zero_stage < 3:
        return own * size.total
    return round(own * size.total / training.world_size) + own * min(size.total, GATHERED)


def _gradient_bytes(training: TrainingConfig) -> float:
    """Of a value of the network. At the peak all gradients are there, as they are from the second micro-batch on."""
    summed = _summed_bytes(training)
    return summed if training.zero_stage < 2 else summed / training.world_size


def _summed_bytes(training: TrainingConfig) -> int:
    """Of a gradient: bf16 ones of several micro-batches are added up in fp32."""
    return FP32 if training.gradient_accumulation_steps > 1 else activations.itemsize(training)


def _activation_bytes(phase: Phase, size: Parameters) -> int:
    training = phase.recipe.training
    bucket = activations.itemsize(training) * min(size.total, GROUP_VALUES) if training.zero_stage else 0
    return activations.kept_bytes(phase, training) + activations.working_bytes(phase, training) + bucket


def _stepping_bytes(training: TrainingConfig, size: Parameters, *, adamw: bool) -> float:
    """Above all gradients, the most that stepping takes: first copies of those that step together, then the update."""
    # AdamW updates all that it steps at once; AdaFactor goes parameter by parameter: update, square and a product.
    together = float(size.total)
    if training.zero_stage:
        together = min(size.total, max(GROUP_VALUES, size.largest)) / training.world_size
    update = FP32 * together if adamw else 3 * FP32 * size.largest
    if training.zero_stage == 0:
        reduced = activations.itemsize(training) * min(size.total, REDUCED) if training.world_size > 1 else 0
        return max(reduced, update if _is_plain(training) else FP32 * together + update)
    summed = _summed_bytes(training)
    copies = summed * together + (FP32 * together if summed < FP32 else 0.0)  # laid end to end, then in fp32
    return max(copies, (FP32 - summed) * together + update)


def _is_plain(training: TrainingConfig) -> bool:
    """Whether the weights are the masters."""
    return training.zero_stage == 0 and training.precision == "fp32"
