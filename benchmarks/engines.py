"""Engines on the same inputs in one run, and what a step cache saves: `python -m benchmarks.engines [--quick]`.

It owns the shapes, the clocks and the figures; engines, sampler and checkpoints are the ones that users have. Engines
take turns within one process, and a figure is the median over turns of the ratio within a turn.

- `cpu_*_speedup_over_eager`: ONNX Runtime, the engine that is served by default on a CPU, against eager PyTorch, at
  three shapes; `cpu_speedup_over_eager` is the least of them. Wide networks are bound by matrix products, in which
  both are equally fast, so the gain falls with width. `cpu_*_compile_speedup` is torch.compile against eager.
- `step_cache_*`: videos of a trained tiny checkpoint (`--store`, as `python -m benchmarks.demo` makes it) with and
  without a step cache at equal seeds. `fewer_steps_psnr_db`: as few network calls without one.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch

from benchmarks.contestants.model_step import LATENT_CHANNELS, Shape
from benchmarks.demo import FOLDER
from benchmarks.model_speed import ratio, take_turns
from benchmarks.result import report
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import Engine
from export.engines.torch import TorchEngine
from export.onnx import export_onnx
from infra.registry.registry import Registry
from infra.store.location import open_store
from infra.trained import fetch_trained
from model.conditioning import Conditions
from model.generation import Clip, ClipGenerator
from model.measures.similarity import psnr
from model.network.stiv import STIV
from model.recipe import StageRecipe

TEXT = 384
SHAPES = {
    "tiny": Shape(hidden=160, depth=4, heads=5, frames=4, side=4, text=20, batch=2, temporal_patch=2),
    "narrow": Shape(hidden=384, depth=6, heads=6, frames=4, side=8, text=20, batch=2, temporal_patch=2),
    "xl": Shape(hidden=1152, depth=3, heads=18, frames=4, side=16, text=20, batch=2, temporal_patch=2),
}
"""A video with guidance; XL's width at a ninth of its depth."""
CAPTIONS = tuple(
    f"a {color} {shape} moves {way}"
    for color in ("red", "green", "blue")
    for shape in ("circle", "square")
    for way in ("left", "right")
)
THRESHOLD = 0.12


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape, one turn; keeps nothing")
    parser.add_argument("--store", type=Path, default=FOLDER / "store", help="has a trained t2v/promoted")
    arguments = parser.parse_args()
    quick = bool(arguments.quick)
    torch.set_num_threads(len(psutil.Process().cpu_affinity() or [0]))
    figures: dict[str, float] = {}
    for name in ("tiny",) if quick else SHAPES:
        figures |= engine_figures(name, SHAPES[name], turns=1 if quick else 9, compiled=not quick)
    speedups = [value for name, value in figures.items() if name.endswith("_speedup_over_eager")]
    figures["cpu_speedup_over_eager"] = min(speedups)
    if arguments.store.exists():
        figures |= step_cache_figures(arguments.store, clips=2 if quick else len(CAPTIONS))
    elif not quick:
        raise ValueError(
            f"--store {arguments.store} is not there; run python -m benchmarks.demo, or name another store"
        )
    report("engines", figures, quick=quick)


def engine_figures(name: str, shape: Shape, *, turns: int, compiled: bool) -> dict[str, float]:
    """Seconds a call, ratios and errors of the engines at one shape."""
    recipe, network = _network(shape)
    inputs = _inputs(shape)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_onnx(network, Path(folder) / "model.onnx", recipe=recipe)
        engines: dict[str, Engine] = {"eager": TorchEngine(network), "onnx": OnnxEngine(exported.path)}
        if compiled:
            engines["compile"] = TorchEngine(_network(shape)[1], mode="compiled")
        answers = {each: engine.denoise(*inputs) for each, engine in engines.items()}

        seconds = take_turns({each: partial(_call, engine, inputs) for each, engine in engines.items()}, turns)
    figures = {f"cpu_{name}_{each}_seconds": statistics.median(taken) for each, taken in seconds.items()}
    figures[f"cpu_{name}_export_seconds"] = exported.seconds
    figures[f"cpu_{name}_max_abs_error"] = float((answers["onnx"] - answers["eager"]).abs().max())
    figures[f"cpu_{name}_speedup_over_eager"] = ratio(seconds, "eager", "onnx")
    if compiled:
        figures[f"cpu_{name}_compile_speedup"] = ratio(seconds, "eager", "compile")
    return figures


def step_cache_figures(store: Path, *, clips: int) -> dict[str, float]:
    """Speed-up in network rows and in seconds, and PSNR against the sampler without a cache at equal seeds."""
    with tempfile.TemporaryDirectory() as folder:
        trained = fetch_trained(Registry(open_store(str(store))), "t2v/promoted", Path(folder))
        generator = trained.generator("cpu")
        steps, captions = trained.recipe.sampling.num_steps, CAPTIONS[:clips]
        plain, rows, seconds = drawn(generator, captions)
        cached, fewer_rows, fewer_seconds = drawn(generator, captions, step_cache=THRESHOLD)
        shorter, _, _ = drawn(generator, captions, num_steps=round(steps * fewer_rows / rows))
    return {
        "step_cache_threshold": THRESHOLD,
        "step_cache_speedup": seconds / fewer_seconds,
        "step_cache_call_ratio": rows / fewer_rows,
        "step_cache_psnr_db": _psnr(cached, plain),
        "fewer_steps_psnr_db": _psnr(shorter, plain),
    }


def drawn(generator: ClipGenerator, captions: tuple[str, ...], **sampling: float) -> tuple[list[Clip], int, float]:
    """Clips, the rows that the network saw, and seconds."""
    recipe, rows = generator.recipe, 0
    changed = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=sampling)})
    network = generator.velocity

    def counted(latents: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        nonlocal rows
        rows += len(latents)
        return network(latents, t, conditions)  # pyright: ignore[reportCallIssue, reportUnknownVariableType]

    began = time.perf_counter()
    found = replace(generator, velocity=counted, recipe=changed)(captions, seed=1)
    return found, rows, time.perf_counter() - began


def _psnr(found: list[Clip], wanted: list[Clip]) -> float:
    """Mean over clips, dB."""
    return statistics.fmean(psnr(a, b) for a, b in zip(found, wanted, strict=True))


def _call(engine: Engine, inputs: tuple[torch.Tensor, torch.Tensor, Conditions]) -> None:
    engine.denoise(*inputs)


def _network(shape: Shape) -> tuple[StageRecipe, STIV]:
    """With random weights, no branch closed."""
    frames, _, height, width = shape.latents
    recipe = StageRecipe.model_validate(
        {
            "name": "engines",
            "task": "t2v",
            "network": shape.config().model_dump(),
            "video": {"num_frames": frames, "height": 8 * height, "width": 8 * width},
            "vae": {"latent_channels": LATENT_CHANNELS, "spatial_factor": 8},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "gate": [{"metric": "heldout_loss", "op": "<", "bound": 1.0}],
        }
    )
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    network = STIV(recipe.network, latent_channels=LATENT_CHANNELS, text_size=TEXT, pooled_size=TEXT)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return recipe, network.eval().requires_grad_(False)


def _inputs(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(shape.batch, *shape.latents, generator=draw)
    text = torch.randn(shape.batch, shape.text, TEXT, generator=draw)
    mask = torch.ones(shape.batch, shape.text, dtype=torch.bool)
    pooled = torch.randn(shape.batch, TEXT, generator=draw)
    times = torch.rand(shape.batch, generator=draw)
    return latents, times, Conditions(text, mask, pooled, torch.ones(shape.batch, 6))


if __name__ == "__main__":
    main()
