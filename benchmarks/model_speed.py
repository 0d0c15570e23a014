"""Our transformer against diffusers' Latte, and how well it fills a GPU: `python -m benchmarks.model_speed [--quick]`.

It owns clocks, memory and the figures; `model_step` owns what is timed and says what is equal and what is not, and
`model_mfu` the training step on a GPU. Models take turns within one process and a figure is the median over turns of
the ratio within a turn, so that a machine's drift touches both sides. Peak memory is of a process of its own for each
model: what it grew above where it stood before the network was built, so weights and gradients count.

On a CPU, float32 on all cores:
- `cpu_*_ratio_to_latte`: width 384, depth 28 (XL's and Latte-1's), 8 frames of 256 tokens; `wide_*` the same at width
  768, depth cut to 8.
- `masked_step_ratio`: our step with half of the spatial tokens masked against our own without, at depth 28 with 1024
  spatial tokens, those of the 512x512 stages, where masking is meant to save; `masked_step_ratio_256` with 256 tokens.
  The last two of 28 blocks see everything, so what is linear in tokens alone comes to 0.536; attention, which is
  quadratic, brings it below. Its share falls with width: `masked_xl_512_flops_ratio` is the count for XL itself.

On a GPU, bfloat16 under autocast: the same ratios eager and with each block compiled, and `model_mfu`'s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import psutil
import torch

from benchmarks.contestants.model_mfu import mfu_figures
from benchmarks.contestants.model_step import Contestant, Shape, latte, ours
from benchmarks.result import report
from model.network.flops import training_flops

ROOT = Path(__file__).parent.parent
MASK_RATIO = 0.5
NARROW = Shape(hidden=384, depth=28, heads=6, frames=8, side=16)
WIDE = Shape(hidden=768, depth=8, heads=12, frames=8, side=16)
MASKED = Shape(hidden=384, depth=28, heads=6, frames=2, side=32)
XL_512 = Shape(hidden=1152, depth=28, heads=18, frames=10, side=32, temporal_patch=2)
ON_GPU = Shape(hidden=1152, depth=28, heads=18, frames=10, side=16, batch=4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shallow networks, one turn; keeps nothing")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(json.dumps(peak_here(json.loads(arguments.peak_of))))
        return
    quick = bool(arguments.quick)
    figures = gpu_figures(quick=quick) if torch.cuda.is_available() else cpu_figures(quick=quick)
    report("model_speed", figures, quick=quick)


def cpu_figures(*, quick: bool, turns: int = 5) -> dict[str, float]:
    torch.set_num_threads(len(psutil.Process().cpu_affinity() or []) or os.cpu_count() or 1)
    turns = 1 if quick else turns
    figures: dict[str, float] = {}
    for prefix, shape in (("cpu", NARROW), ("cpu_wide", WIDE)):
        figures |= against_latte(prefix, _shallow(shape) if quick else shape, turns)
    for suffix, shape in (("", MASKED), ("_256", NARROW)):
        figures |= masked_step(suffix, _shallow(shape) if quick else shape, turns)
    whole = training_flops(XL_512.config(), XL_512.latents, XL_512.text)
    masked = training_flops(XL_512.config(), XL_512.latents, XL_512.text, MASK_RATIO)
    return figures | {"masked_xl_512_flops_ratio": masked / whole}


def against_latte(prefix: str, shape: Shape, turns: int) -> dict[str, float]:
    """Seconds, work and memory of both, and the three ratios."""
    models = {"ours": ours(shape), "latte": latte(shape)}
    figures: dict[str, float] = {}
    for name, model in models.items():
        figures[f"{prefix}_{name}_parameters"] = model.parameters
        figures[f"{prefix}_{name}_forward_flops"] = model.flops()
    forward = take_turns({name: model.forward for name, model in models.items()}, turns)
    both = take_turns({name: model.forward_backward for name, model in models.items()}, turns)
    del models
    memory = {name: peak_in_child(name, shape) for name in ("ours", "latte")}
    for name in memory:
        figures[f"{prefix}_{name}_forward_seconds"] = statistics.median(forward[name])
        figures[f"{prefix}_{name}_fwdbwd_seconds"] = statistics.median(both[name])
        figures[f"{prefix}_{name}_peak_gb"] = memory[name] / 1e9
    flops = figures[f"{prefix}_ours_forward_flops"] / figures[f"{prefix}_latte_forward_flops"]
    return figures | {
        f"{prefix}_forward_ratio_to_latte": ratio(forward, "ours", "latte"),
        f"{prefix}_fwdbwd_ratio_to_latte": ratio(both, "ours", "latte"),
        f"{prefix}_memory_ratio_to_latte": memory["ours"] / memory["latte"],
        f"{prefix}_flops_ratio_to_latte": flops,
    }


def masked_step(suffix: str, shape: Shape, turns: int) -> dict[str, float]:
    """Our own forward and backward with and without masking."""
    models = {"masked": ours(shape, mask_ratio=MASK_RATIO), "whole": ours(shape)}
    seconds = take_turns({name: model.forward_backward for name, model in models.items()}, turns)
    return {
        f"whole_step{suffix}_seconds": statistics.median(seconds["whole"]),
        f"masked_step_ratio{suffix}": ratio(seconds, "masked", "whole"),
    }


def gpu_figures(*, quick: bool, turns: int = 10) -> dict[str, float]:
    """Against Latte, eager and compiled, then the share of the card's peak that a training step reaches."""
    shape = _shallow(ON_GPU) if quick else ON_GPU
    figures: dict[str, float] = {}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for mode in ("eager", "compiled"):
            models = {"ours": ours(shape, device="cuda"), "latte": latte(shape, device="cuda")}
            if mode == "compiled":
                for model in models.values():
                    model.compile_blocks()
            memory = {name: _peak_on_gpu(model) for name, model in models.items()}
            both = take_turns({name: model.forward_backward for name, model in models.items()}, 2 if quick else turns)
            forward = take_turns({name: model.forward for name, model in models.items()}, 2 if quick else turns)
            figures |= {
                f"gpu_{mode}_ours_fwdbwd_seconds": statistics.median(both["ours"]),
                f"gpu_{mode}_forward_ratio_to_latte": ratio(forward, "ours", "latte"),
                f"gpu_{mode}_fwdbwd_ratio_to_latte": ratio(both, "ours", "latte"),
                f"gpu_{mode}_memory_ratio_to_latte": memory["ours"] / memory["latte"],
            }
            torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    return figures | mfu_figures(quick=quick)


def take_turns(calls: Mapping[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of each call in each turn, after one of each that does not count."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            _settle()
            began = time.perf_counter()
            call()
            _settle()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, other: str) -> float:
    return statistics.median(mine / its for mine, its in zip(seconds[name], seconds[other], strict=True))


def peak_in_child(name: str, shape: Shape) -> int:
    """Bytes that a process of its own needs for two steps of forward and backward."""
    what = json.dumps({"name": name, "shape": asdict(shape), "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "benchmarks.model_speed", "--peak-of", what]
    told = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(told.splitlines()[-1])


def peak_here(what: Mapping[str, object]) -> int:
    torch.set_num_threads(cast(int, what["threads"]))
    make = {"ours": ours, "latte": latte}[cast(str, what["name"])]
    make(Shape(hidden=32, depth=2, heads=2, frames=2, side=2)).forward_backward()  # libraries and thread pools
    before = psutil.Process().memory_info().rss
    model = make(Shape(**cast(dict[str, int], what["shape"])))
    for _ in range(2):
        model.forward_backward()
    # Not getrusage's figure: that one begins with what the parent held when it started this process.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def _peak_on_gpu(model: Contestant) -> int:
    """Bytes above what was allocated before; the step before it compiles and allocates what stays."""
    model.forward_backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.forward_backward()
    return torch.cuda.max_memory_allocated() - before + 4 * model.parameters


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shallow(shape: Shape) -> Shape:
    """The same step at depth 3 and width 64: enough to run every line, nothing to be kept."""
    return replace(shape, hidden=64, heads=1, depth=3, frames=2)


if __name__ == "__main__":
    main()
