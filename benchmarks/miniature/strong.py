"""The strong recipe: `tiny`, the curriculum that the demo trains, for what the same network family reaches when it is
trained longer.

It owns which of the demo's committed figures the benchmark states; `python -m benchmarks.demo` measures them.
"""

from pathlib import Path

from benchmarks.result import RESULTS, hardware, read_all

FIGURES = ("t2v_joint_accuracy", "ti2v_first_frame_psnr_db", "ti2v_direction_accuracy")


def read_strong(folder: Path = RESULTS) -> dict[str, float]:
    """Those figures of the demo's result on this hardware."""
    here = hardware()
    for result in read_all(folder):
        if (result.name, result.hardware) == ("demo", here):
            return {name: result.figures[name] for name in FIGURES}
    raise ValueError(f"{folder} has no result of the demo on {here}; run `python -m benchmarks.demo` first")
