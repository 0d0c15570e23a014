"""STIV-M, 8.8 billion parameters, trained on one GPU: `python -m benchmarks.train_m [--quick]`. Needs CUDA.

It owns the step and the clock; the network, its optimizer and the engine are those of a run. What is trained is stage
`t2v_256` of recipe `m`, 20 frames of 256 pixels with half of the places masked: bf16 with fp32 masters under ZeRO 2,
AdaFactor with bf16 momentum, gradient clipping, EMA, activation checkpointing, each block compiled. Latents and
captions are random, as their values cost nothing; codec and text encoder are left out.

- `peak_memory_gb`: the most that tensors held at once (`torch.cuda.max_memory_allocated`), building the run included.
- `memory_ratio_to_plan`, `seconds_ratio_to_plan`: against `stiv plan`, which must be near 1.
- `mfu`, `hfu`: operations the network needs, and those with recomputation, over the card's dense bfloat16 peak.
"""

import argparse
import os
import statistics
import time

import torch
from torch import Tensor

from benchmarks.result import report
from flows.catalog import recipe_path
from model.flow_matching import loss_weight, masked_loss, path
from model.network.recompute import compile_blocks, recompute_blocks
from model.network.stiv import STIV
from model.optim.choice import make_optimizer
from model.optim.ema import Ema
from model.planning.gpu import Gpu, gpu_of
from model.planning.memory import memory
from model.planning.phase import latents_of, phases, text_widths
from model.planning.speed import mfu, step_cost, step_time
from model.recipe import StageRecipe, load
from model.training.draws import draw
from model.training.parallel import ParallelEngine, Place, join, leave, parameter_groups

CLIPS = 4
WARM, TIMED = 3, 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_m", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four blocks of the 46, two steps; keeps nothing")
    quick = bool(parser.parse_args().quick)
    gpu = the_gpu()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29_500}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    recipe = recipe_of(depth=4 if quick else None)
    place = join(recipe.training)
    figures = measure(recipe, place, gpu, timed=2 if quick else TIMED)
    leave()
    report("train_m", figures, quick=quick)


def the_gpu() -> Gpu:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.train_m needs an NVIDIA GPU with 141 GB, and PyTorch sees none here")
    card = torch.cuda.get_device_name(0)
    gpu = gpu_of(card)
    if gpu is None:
        raise SystemExit(f"no figures are known of '{card}'; add it to model/planning/gpu.py")
    return gpu


def recipe_of(*, depth: int | None = None, clips: int = CLIPS) -> StageRecipe:
    """The stage on one card, in the layout that `stiv plan` says fits 141 GB."""
    settings = {
        "training.world_size": 1,
        "training.global_batch_size": clips,
        "training.micro_batch_size": clips,
        "training.unmasked_steps": 0,
        "training.zero_stage": 2,
        "training.precision": "'bf16'",
        "training.activation_checkpointing": "true",
        "training.compile": "true",
        "optimizer.momentum": "'bf16'",
    }
    if depth is not None:
        settings["network.depth"] = depth
    overrides = [f"t2v_256.{key}={value}" for key, value in settings.items()]
    return load(recipe_path("m"), overrides).stage("t2v_256")


def measure(recipe: StageRecipe, place: Place, gpu: Gpu, *, timed: int) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    run = Run(recipe, place)
    seconds: list[float] = []
    for number in range(WARM + timed):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run.step(number)
        torch.cuda.synchronize()
        if number >= WARM:
            seconds.append(time.perf_counter() - began)
    phase, step = phases(recipe)[0], statistics.median(seconds)
    cost, planned = step_cost(phase), memory(recipe)
    peak = torch.cuda.max_memory_allocated()
    predicted = step_time(phase, gpu)
    return {
        "peak_memory_gb": peak / 1e9,
        # The plan has the codec on the card, this run has not.
        "memory_ratio_to_plan": peak / (planned.peak - planned.codec),
        "mfu": mfu(recipe.training, cost, step, gpu),
        "hfu": mfu(recipe.training, cost, step, gpu) * cost.hardware_flops / cost.model_flops,
        "step_seconds": step,
        "seconds_ratio_to_plan": step / (predicted.total - predicted.codec),
        "tokens_per_second": cost.tokens / step,
        "parameters": run.parameters,
        "clips": recipe.training.global_batch_size,
    }


class Run:
    """The network in training, on random clips."""

    def __init__(self, recipe: StageRecipe, place: Place) -> None:
        self.recipe, self.device = recipe, place.device
        text, pooled = text_widths(recipe)
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        with self.device:
            network = STIV(
                recipe.network, latent_channels=recipe.vae.latent_channels, text_size=text, pooled_size=pooled
            )
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        _open(network)
        recompute_blocks(network)
        compile_blocks(network)
        optimizer = make_optimizer(parameter_groups(network), recipe.optimizer)
        optimizer.learning_rate = recipe.optimizer.lr
        self.engine = ParallelEngine(network, optimizer, recipe.training, place)
        self.ema = Ema(self.engine.masters, recipe.training.ema_decay)
        clips, length = recipe.training.micro_batch_size, recipe.text.max_tokens
        self.latents = torch.randn(clips, *latents_of(recipe), device=self.device)
        self.caption = torch.randn(clips, length, text, device=self.device)
        self.caption_mask = torch.ones(clips, length, dtype=torch.bool, device=self.device)
        self.pooled = torch.randn(clips, pooled, device=self.device)
        self.micro = torch.ones(clips, 6, device=self.device)

    def step(self, number: int) -> None:
        self.engine.backward(self._loss(number))
        self.engine.step()
        self.ema.update(number)

    def _loss(self, number: int) -> Tensor:
        recipe, latents = self.recipe, self.latents
        clips = range(number * len(latents), (number + 1) * len(latents))
        drawn = draw(recipe, clips, latents.shape[1:], mask_ratio=recipe.training.mask_ratio).to(self.device)
        noisy, target = path(recipe.flow, latents, drawn.noise, drawn.timestep)
        velocity = self.engine(
            noisy, drawn.timestep, self.caption, self.caption_mask, self.pooled, self.micro, keep=drawn.keep
        )
        weight = loss_weight(drawn.frame_mask, latents, keep=drawn.keep, patch_size=recipe.network.patch_size)
        return masked_loss(velocity, target, weight)


@torch.no_grad()
def _open(network: STIV) -> None:
    """Branches that start closed would multiply zeros, which a GPU does with less power, so faster."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


if __name__ == "__main__":
    main()
