"""Engines on the same inputs in one run, and what a step cache saves: `python -m benchmarks.engines [--quick]`.

It owns the shapes, the clocks and the figures; engines, sampler and checkpoints are the ones that users have. Engines
take turns within one process, and a figure is the median over turns of the ratio within a turn.

- `cpu_*_speedup_over_eager`: ONNX Runtime, the engine that is served by default on a CPU, against eager PyTorch, at
  three shapes; `cpu_speedup_over_eager` is the one of the tiny recipe. Wide networks are bound by matrix products, in
  which both are equally fast, so the gain falls with width; `cpu_least_speedup_over_eager` is the least.
- `cpu_*_int8_*`: the quantised graph (static scales). `dynamic_int8`: ONNX Runtime's own `quantize_dynamic`.
- `*_compile_*`: torch.compile. `*_bytes`: files of an engine.
- `rtx_build_seconds_bf16`: a TensorRT-RTX plan of the tiny network, for one architecture, no GPU needed.
- `gpu_*`, with a GPU alone: eager bf16, torch.compile, CUDA graphs, and ONNX Runtime and TensorRT where they are
  installed; `gpu_speedup_over_eager` is the fastest's gain, the least over shapes.
- `step_cache_*`: videos of a trained tiny network with and without a step cache at equal seeds, the network trained
  here unless `--store` has one. `fewer_steps_psnr_db`: as few network calls without a cache.
"""

import argparse
import copy
import importlib
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from benchmarks.contestants.model_step import LATENT_CHANNELS, Shape
from benchmarks.contestants.step_cache import CAPTIONS, step_cache_figures, trained_generator
from benchmarks.model_speed import ratio, take_turns
from benchmarks.result import report
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import Engine
from export.engines.targets import OnnxTarget, TensorRtTarget
from export.engines.tensorrt import TensorRtEngine
from export.engines.torch import TorchEngine
from export.onnx import OnnxExport, export_onnx, graph_weights
from export.parity.inputs import ParityInputs
from export.precision import lower_file
from export.quantize import calibrate, quantize_file
from export.tensorrt.builder import build_plan
from export.tensorrt.options import BuildOptions
from model.conditioning import Conditions
from model.config import Precision
from model.network.stiv import STIV
from model.recipe import StageRecipe

TEXT = 384
SHAPES = {
    "tiny": Shape(hidden=160, depth=4, heads=5, frames=4, side=4, text=20, batch=2, temporal_patch=2),
    "narrow": Shape(hidden=384, depth=6, heads=6, frames=4, side=8, text=20, batch=2, temporal_patch=2),
    "xl": Shape(hidden=1152, depth=3, heads=18, frames=4, side=16, text=20, batch=2, temporal_patch=2),
}
"""A video with guidance; XL's width at a ninth of its depth."""
GPU_SHAPES = {
    "tiny": SHAPES["tiny"],
    "xl": Shape(hidden=1152, depth=28, heads=18, frames=10, side=16, text=77, batch=2, temporal_patch=2),
}
ARCHITECTURE = "sm89"
Call = tuple[torch.Tensor, torch.Tensor, Conditions]
Ratios = dict[str, float]


@dataclass(slots=True, frozen=True)
class Bench:
    """A network at one shape, exported."""

    name: str
    recipe: StageRecipe
    network: STIV
    inputs: Call
    file: OnnxExport

    @classmethod
    def of(cls, name: str, shape: Shape, folder: Path) -> "Bench":
        recipe, network = _network(shape)
        file = export_onnx(network, folder / f"{name}.onnx", recipe=recipe)
        return cls(name, recipe, network, _inputs(shape), file)

    def lowered(self, precision: Precision) -> Path:
        path = self.file.path.with_suffix(f".{precision}.onnx")
        weights = graph_weights(self.network, precision)
        low = [name for name, weight in weights.items() if weight.dtype != torch.float32]
        lower_file(self.file.path, path, precision, low)
        return path

    def quantized(self) -> Path:
        path = self.file.path.with_suffix(".int8.onnx")
        scales = calibrate(self.network, ParityInputs(self.file.profile, self.recipe), "int8")
        quantize_file(self.file.path, path, "int8", scales)
        return path

    def dynamic(self) -> Path:
        """As ONNX Runtime's own tool writes it: weights in int8, scales of the inputs found anew in each call."""
        tool = cast(Any, importlib.import_module("onnxruntime.quantization"))
        path = self.file.path.with_suffix(".dynamic.onnx")
        tool.quantize_dynamic(self.file.path, path, op_types_to_quantize=["MatMul"], per_channel=True)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape, one turn; keeps nothing")
    parser.add_argument("--store", type=Path, help="has a trained t2v/promoted; otherwise one is trained here")
    arguments = parser.parse_args()
    quick, store = bool(arguments.quick), cast(Path | None, arguments.store)
    torch.set_num_threads(len(psutil.Process().cpu_affinity() or [0]))
    with tempfile.TemporaryDirectory() as folder:
        report("engines", measured(Path(folder), store, quick=quick), quick=quick)


def measured(folder: Path, store: Path | None, *, quick: bool) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in ("tiny",) if quick else SHAPES:
        bench = Bench.of(name, SHAPES[name], folder)
        figures |= cpu_figures(bench, turns=1 if quick else 9, others=not quick and name != "xl")
        if name == "tiny":
            figures["rtx_build_seconds_bf16"] = rtx_build_seconds(bench)
    speedups = [figures[f"cpu_{name}_speedup_over_eager"] for name in SHAPES if f"cpu_{name}_export_seconds" in figures]
    figures["cpu_speedup_over_eager"], figures["cpu_least_speedup_over_eager"] = speedups[0], min(speedups)
    figures["cpu_int8_speedup_over_eager"] = figures["cpu_tiny_int8_speedup_over_eager"]
    if torch.cuda.is_available():
        figures |= gpu_figures(folder, turns=1 if quick else 9)
    generator = trained_generator(store, folder / "trained", quick=quick)
    return figures | step_cache_figures(generator, clips=2 if quick else len(CAPTIONS), turns=1 if quick else 3)


def cpu_figures(bench: Bench, *, turns: int, others: bool) -> dict[str, float]:
    """Seconds a call, ratios, errors and bytes of the engines at one shape; `others` take minutes to make."""
    files = {"onnx": bench.file.path}
    if others or bench.name == "tiny":
        files["int8"] = bench.quantized()
    engines: dict[str, Engine] = {"eager": TorchEngine(bench.network)}
    engines |= {name: OnnxEngine(path) for name, path in files.items()}
    if others:
        files["dynamic_int8"] = bench.dynamic()
        engines["dynamic_int8"] = OnnxEngine(files["dynamic_int8"])
        engines["compile"] = TorchEngine(copy.deepcopy(bench.network), mode="compiled")
    figures = _raced(f"cpu_{bench.name}", engines, bench.inputs, turns)
    figures[f"cpu_{bench.name}_speedup_over_eager"] = figures.pop(f"cpu_{bench.name}_onnx_speedup_over_eager")
    figures |= {f"cpu_{bench.name}_{name}_bytes": float(path.stat().st_size) for name, path in files.items()}
    figures[f"cpu_{bench.name}_export_seconds"] = bench.file.seconds
    return figures


def gpu_figures(folder: Path, *, turns: int) -> dict[str, float]:
    """Each engine against eager bf16 on the first GPU; the least gain of the fastest engine over the shapes."""
    figures: dict[str, float] = {}
    for name, shape in GPU_SHAPES.items():
        bench = Bench.of(f"gpu_{name}", shape, folder)
        engines = {each: make(bench) for each, make in _gpu_engines().items()}
        found = _raced(bench.name, engines, bench.inputs, turns)
        gains = [value for key, value in found.items() if key.endswith("_speedup_over_eager")]
        figures |= found | {f"{bench.name}_speedup_over_eager": max(gains)}
        torch.cuda.empty_cache()
    figures["gpu_speedup_over_eager"] = min(figures[f"gpu_{name}_speedup_over_eager"] for name in GPU_SHAPES)
    figures["gpu_peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return figures


def _gpu_engines() -> Mapping[str, Callable[[Bench], Engine]]:
    def of_torch(bench: Bench, **how: Any) -> Engine:
        return TorchEngine(copy.deepcopy(bench.network).to("cuda", torch.bfloat16), **how)

    def of_onnx(bench: Bench) -> Engine:
        return OnnxEngine(bench.lowered("fp16"), target=OnnxTarget(runtime="onnx_runtime", provider="cuda"))

    def of_tensorrt(bench: Bench) -> Engine:
        ranges = bench.file.profile.ranges(bench.recipe)
        plan = build_plan(bench.lowered("bf16"), bench.file.profile, ranges, library="tensorrt")
        return TensorRtEngine(plan.plan, TensorRtTarget(runtime="tensorrt"), bench.file.profile)

    made: dict[str, Callable[[Bench], Engine]] = {
        "eager": of_torch,
        "cuda_graphs": partial(of_torch, cuda_graphs=True),
        "compile": partial(of_torch, mode="compiled", cuda_graphs=True),
    }
    if "CUDAExecutionProvider" in cast(Any, importlib.import_module("onnxruntime")).get_available_providers():
        made["onnx_cuda"] = of_onnx
    if importlib.util.find_spec("tensorrt") is not None:
        made["tensorrt"] = of_tensorrt
    return made


def rtx_build_seconds(bench: Bench) -> float:
    """Of one plan in bf16, all optimization profiles."""
    plan = build_plan(
        bench.lowered("bf16"),
        bench.file.profile,
        bench.file.profile.ranges(bench.recipe),
        library="tensorrt_rtx",
        options=BuildOptions(architectures=(ARCHITECTURE,)),
    )
    return plan.seconds


def _raced(prefix: str, engines: Mapping[str, Engine], inputs: Call, turns: int) -> dict[str, float]:
    """`engines` hold the one called eager; each other one's ratio to it."""
    answers = {name: engine.denoise(*inputs) for name, engine in engines.items()}
    seconds = take_turns({name: partial(_call, engine, inputs) for name, engine in engines.items()}, turns)
    figures = {f"{prefix}_{name}_seconds": statistics.median(taken) for name, taken in seconds.items()}
    for name in engines.keys() - {"eager"}:
        figures[f"{prefix}_{name}_speedup_over_eager"] = ratio(seconds, "eager", name)
        figures[f"{prefix}_{name}_max_abs_error"] = float((answers[name] - answers["eager"]).abs().max())
    return figures


def _call(engine: Engine, inputs: Call) -> None:
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
            "export": {"max_rows": 2},
            "sampling": {"solver": "euler", "stochastic": False, "num_steps": 4},
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
