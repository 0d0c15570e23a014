"""The demo as a whole, measured from outside: `python -m benchmarks.demo [--quick]`.

It owns wall time and memory of the run's processes; the demo's own figures are taken from what it wrote.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from benchmarks.result import report
from monitoring.memory import PeakMemory

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "benchmarks" / "demo"
OWN_FIGURES = ("onnx_max_abs_error", "t2v_joint_accuracy", "ti2v_first_frame_psnr_db")

# Enough of everything to run through, nothing that a gate could hold to.
QUICK = (
    "*.training.steps=6",
    "*.training.unmasked_steps=2",
    "*.training.log_every=2",
    "*.optimizer.warmup_steps=2",
    "*.optimizer.decay_steps=2",
    "*.sampling.num_steps=2",
    "*.evaluation.heldout_clips=8",
    "*.evaluation.sample_prompts=8",
    '*.gate=[{metric="checkpoint_loads", op=">=", bound=1}]',
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few training steps; prints the figures, keeps nothing")
    quick = bool(parser.parse_args().quick)
    report("demo", measure(command(quick=quick), FOLDER / "summary.json"), quick=quick)


def command(*, quick: bool) -> list[str]:
    """The demo in a folder of its own, so that a user's demo stays as it is."""
    overrides = [word for override in QUICK for word in ("--set", override)] if quick else []
    return [
        *(sys.executable, "-m", "flows.demo"),
        *("--root", str(FOLDER), "--report", str(FOLDER / "demo-report.html")),
        *overrides,
    ]


def measure(demo: Sequence[str], summary: Path) -> dict[str, float]:
    """Run the demo to its end and collect its figures; one that fails or leaves a figure out is an error."""
    summary.unlink(missing_ok=True)  # an older run's figures must not pass for this one's
    began = time.monotonic()
    with subprocess.Popen(demo, cwd=ROOT) as process, PeakMemory(process.pid) as memory:
        code = process.wait()
    seconds = time.monotonic() - began
    if code:
        raise RuntimeError(f"the demo ended with exit code {code}; its output above says why")
    figures = cast(dict[str, float | None], json.loads(summary.read_text())["figures"])
    own = {name: value for name, value in figures.items() if value is not None}
    missing = [name for name in OWN_FIGURES if name not in own]
    if missing:
        raise ValueError(f"{summary} has no figure {missing}; it has {sorted(own)}")
    return {**own, "seconds_total": seconds, "peak_rss_gb": memory.gb}


if __name__ == "__main__":
    main()
