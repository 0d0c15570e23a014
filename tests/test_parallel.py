"""Ranks that share optimizer state, gradients or weights train as one process would; whatever ranks hold is exact."""

import json
from typing import Any

import pytest

from tests import parallel_ranks
from tests.cut_ranks import differences
from tests.ranks import run_ranks

EXACT: list[dict[str, Any]] = [
    {"zero": 0, "accumulate": 2, "seed": 0},
    {"zero": 1, "accumulate": 2, "seed": 0},
    {"zero": 2, "accumulate": 2, "seed": 1},
    {"zero": 2, "accumulate": 1, "seed": 2, "clip": 1000.0},
    {"zero": 1, "accumulate": 1, "seed": 3, "momentum": "bf16"},
    {"zero": 2, "accumulate": 2, "seed": 0, "type": "adamw"},
    {"zero": 3, "accumulate": 2, "seed": 0, "type": "adamw"},
]
HALF: list[dict[str, Any]] = [
    {"zero": 0, "accumulate": 1, "seed": 0, "precision": "bf16"},
    {"zero": 1, "accumulate": 1, "seed": 0, "precision": "bf16"},
    {"zero": 2, "accumulate": 2, "seed": 0, "precision": "bf16"},
    {"zero": 3, "accumulate": 2, "seed": 0, "precision": "bf16", "type": "adamw"},
]


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2, 3, pytest.param(4, marks=pytest.mark.slow)]
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every case came to on this number of ranks; one start for all, since it takes seconds."""
    results = tmp_path_factory.mktemp("ranks") / "results.json"
    run_ranks(request.param, parallel_ranks.tell, EXACT + HALF, results)
    return json.loads(results.read_text())


def test_every_zero_stage_is_exact(results: list[dict[str, Any]]) -> None:
    for settings, result in zip(EXACT, results, strict=False):
        assert result["moved"] > 0.03, settings
        assert result["difference"] < 1e-6, settings
        assert result["norms"] < 1e-6, settings


def test_half_precision_follows_its_fp32_masters(results: list[dict[str, Any]]) -> None:
    for settings, result in zip(HALF, results[len(EXACT) :], strict=True):
        assert result["difference"] < 0.05 * result["moved"], settings
        assert result["norms"] < 0.01, settings


def test_all_ranks_together_keep_every_value_once(results: list[dict[str, Any]]) -> None:
    for settings, result in zip(EXACT + HALF, results, strict=True):
        parts = ["exp_avg", "exp_avg_sq"] if settings.get("type") == "adamw" else ["column", "momentum", "row"]
        assert result["parts"] == parts, settings
        assert result["averages"] and result["weights"], settings


def test_cut_parameters_step_as_whole_ones_do_however_they_are_cut() -> None:
    """Random shapes and borders over 1, 2, 3 and 4 ranks; state saved on one number goes on on another."""
    found = differences(trials=40, seed=0)
    assert len(found) == 4 * 40
    assert max(found) < 1e-6
