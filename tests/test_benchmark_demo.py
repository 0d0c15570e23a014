"""The demo's benchmark measures a whole process and believes no figures but that process's own."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.demo import QUICK, command, measure
from flows.catalog import recipe_path
from model.recipe import load

FIGURES = {
    "onnx_max_abs_error": 1e-5,
    "t2v_joint_accuracy": 0.7,
    "ti2v_first_frame_psnr_db": 38.0,
    "seconds_total": 1.0,
}


def program(summary: Path, figures: dict[str, float | None], exit_code: int = 0) -> list[str]:
    """A demo in small: holds memory for a while and leaves a summary."""
    code = f"""
import pathlib, sys, time
held = b"x" * 200_000_000
time.sleep(1.2)
if {exit_code} == 0:
    pathlib.Path({str(summary)!r}).write_text({json.dumps({"figures": figures})!r})
sys.exit({exit_code})
"""
    return [sys.executable, "-c", code]


def test_time_and_memory_are_measured_from_outside(tmp_path: Path) -> None:
    figures = measure(program(tmp_path / "summary.json", {**FIGURES}), tmp_path / "summary.json")
    assert set(figures) == {*FIGURES, "peak_rss_gb"}
    assert 1.2 < figures["seconds_total"] < 60 and 0.2 < figures["peak_rss_gb"] < 0.4
    assert figures["t2v_joint_accuracy"] == 0.7


def test_a_failed_demo_has_no_figures(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"figures": FIGURES}))
    with pytest.raises(RuntimeError, match="the demo ended with exit code 3"):
        measure(program(summary, {**FIGURES}, exit_code=3), summary)
    assert not summary.exists()


def test_a_figure_left_out_is_named(tmp_path: Path) -> None:
    incomplete = {**FIGURES, "t2v_joint_accuracy": None}
    with pytest.raises(ValueError, match=r"has no figure \['t2v_joint_accuracy'\]"):
        measure(program(tmp_path / "summary.json", incomplete), tmp_path / "summary.json")


def test_the_quick_run_is_a_sound_recipe_of_few_steps() -> None:
    stages = load(recipe_path("tiny"), QUICK).stages
    assert all(stage.training.total_steps == 8 for stage in stages)
    assert command(quick=True).count("--set") == len(QUICK) and "--set" not in command(quick=False)
