"""A run's process: `python -m benchmarks.miniature.worker ROW SEED ROOT`, started by `schedule`.

It owns the process: its place as a single rank, its end with its parent's, its log. What it computes is `runs`'.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.miniature.runs import Workplace, execute
from benchmarks.miniature.table import all_rows, quick

ROOT = Path(__file__).parent.parent.parent
_PR_SET_PDEATHSIG = 1


def start(row: str, seed: int, place: Workplace, *, short: bool) -> subprocess.Popen[bytes]:
    """A single rank on one core, as torchrun would start it; port 0 lets the system choose one."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", "benchmarks.miniature.worker", row, str(seed), str(place.root)]
    with log(place, row, seed).open("wb") as output:
        return subprocess.Popen(
            [*command, *(["--quick"] if short else [])],
            cwd=ROOT,
            env={**os.environ, **rank, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def log(place: Workplace, row: str, seed: int) -> Path:
    """Beside the run's folder, which a run empties."""
    return place.root / f"{row}.{seed}.log"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.worker", description="Train and measure one run."
    )
    parser.add_argument("row")
    parser.add_argument("seed", type=int)
    parser.add_argument("root", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if sys.platform == "linux":  # a run that nobody waits for would hold its folder
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rows = quick(all_rows()) if options.quick else all_rows()
    execute(rows, options.row, options.seed, Workplace(options.root))


if __name__ == "__main__":
    main()
