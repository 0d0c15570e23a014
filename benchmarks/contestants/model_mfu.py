"""How much of a GPU's arithmetic a training step uses (MFU), over batch sizes, for the paper's shapes.

It owns the step (bfloat16 forward and backward with each block compiled, then AdaFactor on float32 weights) and the
sweep. MFU counts what the network needs by `model.network.flops`, not what the kernels do.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from benchmarks.contestants.model_step import TEXT_SIZE, Shape, ours
from model.network.flops import training_flops
from model.optim.adafactor import AdaFactor
from model.planning.gpu import GPUS, gpu_of

HIDDEN_3072 = Shape(hidden=3072, depth=8, heads=48, frames=10, side=16, temporal_patch=2)
"""M of the paper at 256x256 and 20 frames, its depth of 46 cut to what one card holds with its optimizer's state."""
XL = Shape(hidden=1152, depth=28, heads=18, frames=10, side=16, temporal_patch=2)
BATCHES = (1, 2, 4, 8, 16, 32)


def mfu_figures(*, quick: bool) -> dict[str, float]:
    """The best MFU over batch sizes for each network at 256x256, with its batch; the same at 512x512."""
    peak = peak_of(torch.cuda.get_device_name(0))
    figures: dict[str, float] = {}
    for name, shape in (("hidden_3072", HIDDEN_3072), ("xl", XL)):
        for suffix, side in (("", 16), ("_512", 32)):
            measured = sweep(replace(shape, side=side), BATCHES[:1] if quick else BATCHES)
            best = max(measured, key=lambda batch: flops_a_second(shape_of(shape, side, batch), measured[batch]))
            figures |= {
                f"gpu_mfu_{name}{suffix}": flops_a_second(shape_of(shape, side, best), measured[best]) / peak,
                f"gpu_mfu_{name}{suffix}_batch": best,
                f"gpu_step_{name}{suffix}_seconds": measured[best],
            }
    return figures


def peak_of(card: str) -> float:
    gpu = gpu_of(card)
    if gpu is None:
        raise ValueError(f"no peak is known for '{card}'; known are {sorted(GPUS)}: add it to model/planning/gpu.py")
    return gpu.bf16


def shape_of(shape: Shape, side: int, batch: int) -> Shape:
    return replace(shape, side=side, batch=batch)


def flops_a_second(shape: Shape, seconds: float) -> float:
    clip = training_flops(shape.config(), shape.latents, shape.text, text_size=TEXT_SIZE, pooled_size=TEXT_SIZE)
    return shape.batch * clip / seconds


def sweep(shape: Shape, batches: tuple[int, ...]) -> dict[int, float]:
    """Seconds of a step by batch size, up to the last that fits the card."""
    measured: dict[int, float] = {}
    for batch in batches:
        try:
            measured[batch] = step_seconds(replace(shape, batch=batch), device="cuda")
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
    if not measured:
        raise ValueError(f"{shape} does not fit the card at batch {batches[0]}; cut its depth")
    return measured


def step_seconds(shape: Shape, *, device: str, steps: int = 5, compiled: bool = True) -> float:
    """Median seconds of a training step: forward, backward, AdaFactor."""
    step, _ = training_step(shape, device=device, compiled=compiled)
    seconds: list[float] = []
    for number in range(3 + steps):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:  # the first compile, allocate and warm the card
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def training_step(shape: Shape, *, device: str, compiled: bool) -> tuple[Callable[[], None], nn.Module]:
    """The step, and the network that it moves."""
    model = ours(shape, device=device)
    if compiled:
        model.compile_blocks()
    optimizer = AdaFactor(model.network.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            model.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model.network
