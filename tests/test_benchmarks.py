"""A benchmark's result has one form and one place, and the page of results is what the results say."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks import docs, result


def measured(**changes: object) -> result.Result:
    fields: dict[str, object] = {
        "name": "demo",
        "date": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "hardware": "cpu-2core-xeon",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "command": "python -m benchmarks.demo",
        "figures": {"seconds_total": 623.4321, "onnx_max_abs_error": 1.3e-5},
    }
    return result.Result.model_validate({**fields, **changes})


def test_the_page_says_what_the_committed_results_say() -> None:
    assert docs.PAGE.read_text() == docs.page(result.read_all()), "run `make bench-docs` and commit the page"


def test_a_result_is_written_in_the_form_every_benchmark_shares(tmp_path: Path) -> None:
    path = result.write(measured(), tmp_path)
    assert path.name == "demo.cpu-2core-xeon.json"
    assert json.loads(path.read_text()) == {
        "name": "demo",
        "date": "2026-01-02T03:04:05Z",
        "hardware": "cpu-2core-xeon",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "command": "python -m benchmarks.demo",
        "figures": {"seconds_total": 623.4321, "onnx_max_abs_error": 1.3e-5},
    }
    assert result.read_all(tmp_path) == [measured()]


@pytest.mark.parametrize(
    "changes",
    [
        {"figures": {}},
        {"figures": {"loss": float("nan")}},
        {"figures": {"Seconds Total": 1.0}},
        {"hardware": "my-laptop"},
        {"date": datetime(2026, 1, 2)},
        {"note": "extra"},
    ],
)
def test_a_result_out_of_form_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        measured(**changes)


def test_a_result_under_another_name_is_refused(tmp_path: Path) -> None:
    result.write(measured(), tmp_path).rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"belongs in demo\.cpu-2core-xeon\.json; rename it"):
        result.read_all(tmp_path)


def test_a_report_prints_the_figures_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--clips", "4"])
    path = result.report("demo", {"seconds_total": 12.5}, quick=False, folder=tmp_path)
    assert path is not None and path.parent == tmp_path
    (kept,) = result.read_all(tmp_path)
    assert kept.figures == {"seconds_total": 12.5}
    assert kept.command == "python -m benchmarks.demo --clips 4"
    assert {"python", "torch", "onnxruntime"} <= kept.versions.keys()
    assert "seconds_total" in capsys.readouterr().out


def test_a_quick_report_prints_and_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert result.report("demo", {"seconds_total": 12.5}, quick=True, folder=tmp_path) is None
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "12.5" in shown and "nothing was written" in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Intel(R) Xeon(R) Processor", "xeon"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "xeon-platinum-8488c"),
        ("AMD EPYC 9R14 96-Core Processor", "epyc-9r14"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("(R)", "unknown"),
    ],
)
def test_hardware_is_named_by_what_decides_speed(text: str, expected: str) -> None:
    assert result.slug(text) == expected


def test_this_machine_has_a_name_a_result_accepts() -> None:
    assert measured(hardware=result.hardware()).hardware.startswith(("cpu-", "gpu-"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(623.4321, "623.4"), (0.875, "0.8750"), (1.312e-5, "1.312e-05"), (0.0, "0"), (42.0, "42"), (2.5e7, "2.500e+07")],
)
def test_a_figure_is_shown_with_four_digits(value: float, expected: str) -> None:
    assert result.number(value) == expected


def test_the_page_sets_machines_side_by_side() -> None:
    results = [measured(), measured(hardware="gpu-1x-h200", figures={"seconds_total": 61.5, "peak_rss_gb": 4.25})]
    page = docs.page(results)
    assert "| figure | cpu-2core-xeon | gpu-1x-h200 |" in page
    assert "| `seconds_total` | 623.4 | 61.50 |" in page
    assert "| `peak_rss_gb` |  | 4.250 |" in page
    assert "- gpu-1x-h200, 2026-01-02: `python -m benchmarks.demo` with python 3.11.7, torch 2.13.0" in page


def test_a_page_without_results_says_so() -> None:
    assert "No measurement is committed yet." in docs.page([])
