"""How long a training step takes: a prediction from shapes and a card's figures, before anything has run.

Each part is what bounds it: matrix products by arithmetic, what is done element by element by memory's bandwidth,
collectives by the links. Parts are added up as if nothing overlapped and nothing waited; loading, kernels too short
to fill a card and checkpoints are not in it. The coefficients stand here, each with where it comes from; a run's own
MFU is the judge. It knows nothing of memory's size or of which layout to choose.
"""

from dataclasses import asdict, dataclass
from math import ceil, prod

from model.config import NetworkConfig, TrainingConfig
from model.network.cost import Cost, training_cost
from model.planning import codec
from model.planning.activations import itemsize
from model.planning.gpu import Gpu
from model.planning.memory import parameters
from model.planning.phase import Phase, latents_of, text_widths
from model.recipe import StageRecipe

PRODUCTS = 0.85
"""Of the best matrix product a card reaches (`Gpu.matmul`): a network's products are smaller. Assumed."""
ATTENTION = 0.30
"""Of the peak, over whole tiles: FlashAttention 2 with heads of 64 reaches 30 to 35 % on an H100 (its authors' and
FlashAttention 3's figures)."""
TILE = 64
"""Queries and keys a tile: shorter sequences pay for a whole one. Time's are ten to twenty long."""
ATTENTION_BACKWARD = 2.5
"""Of its forward: five products for two."""
BANDWIDTH = 0.85
"""Of the data sheet's, as streaming kernels reach. Assumed."""
CONVOLUTIONS = 0.35
"""Of the TF32 peak, half of bfloat16's, in which PyTorch convolves float32. Assumed."""
LINKS = 0.8
"""Of the links' rate, as NCCL's large rings reach. Assumed."""
ADAFACTOR, ADAMW = 26, 22
"""fp32 values read and written a parameter: gradient, state, update, master and average. Counted from the code."""


LAUNCH = 6e-6
"""Seconds PyTorch takes to start a kernel, and so a lower bound of its time. Assumed."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """A block's: each pair is without attention over time, and with it."""

    forward: tuple[float, float]
    """Values of the network's width read and written a token, but for matrix products and attention."""
    backward: tuple[float, float]
    started_forward: tuple[int, int]
    """How many there are, all told."""
    started_backward: tuple[int, int]


WRITTEN_OUT = Kernels((70, 108), (191, 274), (60, 93), (134, 195))
SINGLE = Kernels((77, 127), (149, 223), (38, 61), (88, 131))
"""In fp32 and in bf16: counted from the operations that a block runs. RoPE turns bf16 in fp32."""
COMPILED = Kernels((27, 34), (101, 135), (22, 30), (50, 70))
"""Counted from the graphs AOTAutograd makes of a block, where what lies between two matrix products is one kernel."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step of all ranks together, by what takes them."""

    products: float
    attention: float
    elementwise: float
    """Norms, modulation, RoPE, GELU, residuals: bound by memory."""
    starting: float
    """By which starting the kernels takes longer than they do."""
    codec: float
    """Turning pixels into latents."""
    sequence: float
    """Switching between frames and places among ranks that share a clip."""
    gradients: float
    """Reducing them, and with ZeRO gathering weights."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def step_cost(phase: Phase) -> Cost:
    """Of one optimizer step over all ranks."""
    recipe = phase.recipe
    width, pooled = text_widths(recipe)
    clip = training_cost(
        recipe.network,
        recipe.training,
        latents=(1, *latents_of(recipe)),
        text=(1, recipe.text.max_tokens, width),
        pooled_size=pooled,
        masked=phase.masked,
    )
    return clip * recipe.training.global_batch_size


def step_time(phase: Phase, gpu: Gpu) -> StepTime:
    recipe, training = phase.recipe, phase.recipe.training
    micro_batches = training.gradient_accumulation_steps
    clips = training.micro_batch_size * micro_batches  # of a step, on a rank or the ranks that share them
    share = clips / training.sequence_parallel
    products = share * _linear_flops(phase) / _matmul_rate(training, gpu)
    attention = share * _attention_seconds(phase, gpu)
    elementwise = share * _elementwise_bytes(phase) / (gpu.bandwidth * BANDWIDTH)
    starting = micro_batches * _kernels_started(phase) * LAUNCH
    switching = share * _switching_bytes(phase) / (_link(gpu, training.sequence_parallel) * LINKS)
    return StepTime(
        products=products,
        attention=attention,
        elementwise=elementwise,
        starting=max(0.0, starting - products - attention - elementwise),
        # Ranks that share a clip encode it each for itself.
        codec=clips * codec.encoding_flops(recipe) / (gpu.bf16 / 2 * CONVOLUTIONS),
        sequence=switching,
        gradients=_reduced_bytes(recipe) / (_link(gpu, training.world_size) * LINKS),
        optimizer=_stepped_bytes(recipe) / (gpu.bandwidth * BANDWIDTH),
    )


def _linear_flops(phase: Phase) -> int:
    """Of a clip: forward, twice that backward, and the blocks' once more where they are computed again."""
    again = phase.flops.linear if phase.recipe.training.activation_checkpointing else 0
    return 3 * (phase.flops.ends + phase.flops.linear) + again


def _matmul_rate(training: TrainingConfig, gpu: Gpu) -> float:
    best = gpu.matmul if training.precision == "bf16" else 1.0
    return gpu.peak(training.precision) * best * PRODUCTS


def _kernels(phase: Phase) -> Kernels:
    training = phase.recipe.training
    if training.compile:
        return COMPILED
    return SINGLE if training.precision == "bf16" else WRITTEN_OUT


def _forwards(phase: Phase) -> int:
    return 2 if phase.recipe.training.activation_checkpointing else 1


def _kernels_started(phase: Phase) -> int:
    """In a micro-batch."""
    kernels, over_time = _kernels(phase), int(phase.recipe.network.temporal_attention)
    block = _forwards(phase) * kernels.started_forward[over_time] + kernels.started_backward[over_time]
    return phase.recipe.network.depth * block


def _attention_seconds(phase: Phase, gpu: Gpu) -> float:
    """Of a clip, forward and backward, cross-attention once more if blocks are computed again."""
    recipe, training = phase.recipe, phase.recipe.training
    network = recipe.network
    selves = cross = 0.0
    for count, (frames, places) in phase.blocks:
        selves += count * frames * _attention_flops(network, places, places)
        if network.temporal_attention:
            selves += count * places * _attention_flops(network, frames, frames)
        cross += count * _attention_flops(network, frames * places, phase.context)
    passes = 1 + ATTENTION_BACKWARD
    again = cross if training.activation_checkpointing else 0.0
    achieved = gpu.peak(training.precision) * (ATTENTION if training.precision == "bf16" else PRODUCTS)
    return (passes * (selves + cross) + again) / achieved


def _attention_flops(network: NetworkConfig, queries: int, keys: int) -> int:
    return 4 * TILE**2 * ceil(queries / TILE) * ceil(keys / TILE) * network.hidden_size


def _elementwise_bytes(phase: Phase) -> float:
    """Of a clip."""
    network, training = phase.recipe.network, phase.recipe.training
    kernels, over_time = _kernels(phase), int(network.temporal_attention)
    values = _forwards(phase) * kernels.forward[over_time] + kernels.backward[over_time]
    return _block_tokens(phase) * values * network.hidden_size * itemsize(training)


def _switching_bytes(phase: Phase) -> float:
    """Sent and received by a rank for a clip's share: to places and back, in each pass."""
    network, training = phase.recipe.network, phase.recipe.training
    ranks = training.sequence_parallel
    if ranks == 1 or not network.temporal_attention:
        return 0.0
    return (
        (_forwards(phase) + 1)
        * 2
        * _block_tokens(phase)
        * (ranks - 1)
        / ranks
        * network.hidden_size
        * itemsize(training)
    )


def _block_tokens(phase: Phase) -> int:
    """That all blocks see of a clip, added up."""
    return sum(count * prod(grid) for count, grid in phase.blocks)


def _reduced_bytes(recipe: StageRecipe) -> float:
    """That a rank sends in a step.

    DeepSpeed sums gradients to all ranks at stages 0 to 2: stages 0 and 1 once a step, 2 after every micro-batch. 1 and
    2 then gather the weights; 3 gathers them for each pass and only scatters the sums.
    """
    training = recipe.training
    ranks, own = training.world_size, itemsize(training)
    if ranks == 1:
        return 0.0
    once = parameters(recipe).total * own * (ranks - 1) / ranks
    micro_batches = training.gradient_accumulation_steps
    if training.zero_stage == 3:
        return 3 * once * micro_batches
    sums = micro_batches if training.zero_stage == 2 else 1
    return 2 * once * sums + (once if training.zero_stage else 0.0)


def _stepped_bytes(recipe: StageRecipe) -> float:
    training = recipe.training
    values = ADAMW if recipe.optimizer.type == "adamw" else ADAFACTOR
    share = training.world_size if training.zero_stage else 1
    return 4 * values * parameters(recipe).total / share


def _link(gpu: Gpu, ranks: int) -> float:
    """Bytes a second of a group of consecutive ranks: what leaves the machine waits for the network."""
    return gpu.link if ranks <= gpu.node else gpu.network


def mfu(training: TrainingConfig, cost: Cost, seconds: float, gpu: Gpu) -> float:
    """Model operations over what the cards could do in that time, at the peak of the precision trained in."""
    return cost.model_flops / (seconds * training.world_size * gpu.peak(training.precision))
