"""Alerting rules by Prometheus' own tools: each fires where it must, keeps silent where it must, and is explained.

Series are in promtool's notation: `a+bxn` begins at a and grows n times by b. One sample a minute.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.reference import PROCESSES, exposed_names

ROOT = Path(__file__).parent.parent
RULES = ROOT / "monitoring" / "rules" / "stiv.yml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
RUN = 'instance="rank0"'
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no `promtool` on this machine")

Series = dict[str, str]


@dataclass(frozen=True)
class Case:
    firing: Series
    """With these it fires at `at`."""
    silent: Series
    """With these, which are as near to it as what must not alarm anybody, it does not."""
    at: str = "2h"


def jobs(completed: str, failed: str) -> Series:
    values = {"completed": completed, "failed": failed}
    return {f'stiv_jobs_total{{outcome="{name}"}}': numbers for name, numbers in values.items()}


def slow_videos(an_hour: int) -> Series:
    """Five hours of many quick videos, then as many slow ones an hour as said."""
    quick, all_of_them = "0+9x300 2700x90", f"0+9x300 2700+{an_hour / 60}x90"
    buckets = {"10": quick, "60": all_of_them, "+Inf": all_of_them}
    values = {f'stiv_job_seconds_bucket{{work="1e6",le="{edge}"}}': numbers for edge, numbers in buckets.items()}
    return {**values, 'stiv_job_seconds_count{work="1e6"}': all_of_them}


def probe_at(seconds: int) -> Series:
    return {"stiv_probe_last_success_timestamp_seconds": f"{seconds}x200"}


CASES: dict[str, Case] = {
    "TrainingStalled": Case(
        {f"stiv_training_steps_total{{{RUN}}}": "0+10x60 600x200"}, {f"stiv_training_steps_total{{{RUN}}}": "0+1x200"}
    ),
    "NoDurableCheckpoint": Case(
        {
            f"stiv_training_last_checkpoint_timestamp_seconds{{{RUN}}}": "1200x200",
            f"stiv_training_steps_total{{{RUN}}}": "0+1x200",
        },
        {  # young: it has had no hour to write one in
            f"stiv_training_last_checkpoint_timestamp_seconds{{{RUN}}}": "_x90 0x60",
            f"stiv_training_steps_total{{{RUN}}}": "_x90 0+1x60",
        },
    ),
    "LossNotFinite": Case(
        {f"stiv_training_loss{{{RUN}}}": "0.5x100" + " NaN" * 100, f"stiv_training_steps_total{{{RUN}}}": "0+1x200"},
        {f"stiv_training_loss{{{RUN}}}": " ".join(["NaN"] * 200), f"stiv_training_steps_total{{{RUN}}}": "0x200"},
    ),
    "LossSpiking": Case(
        {f"stiv_training_loss{{{RUN}}}": "0.2x110 0.5x90", f"stiv_training_steps_total{{{RUN}}}": "0+9x200"},
        {f"stiv_training_loss{{{RUN}}}": "0.2x118 0.5x1 0.2x90", f"stiv_training_steps_total{{{RUN}}}": "0+9x200"},
    ),
    "GradNormSpiking": Case(
        {
            f"stiv_training_grad_norm{{{RUN}}}": "1 1.1 0.9 1 1.1 0.9 " * 19 + "1 1 1 1 1 40 40 40 40 40",
            f"stiv_training_steps_total{{{RUN}}}": "0+9x200",
        },
        {
            f"stiv_training_grad_norm{{{RUN}}}": "1 1.1 0.9 1 1.1 0.9 " * 19 + "1 1 1 1 1 1.2 1.3 1.2 1.2 1.2",
            f"stiv_training_steps_total{{{RUN}}}": "0+9x200",
        },
        at="123m",
    ),
    "GoodputLow": Case(
        {f"stiv_training_goodput_ratio{{{RUN}}}": "0.7x200"},
        {f"stiv_training_goodput_ratio{{{RUN}}}": "0.7x20 0.9x200"},
    ),
    "Straggler": Case(
        {f"stiv_training_straggler_ratio{{{RUN}}}": "1.5x200"},
        {f"stiv_training_straggler_ratio{{{RUN}}}": " ".join(["NaN"] * 200)},
    ),
    "ErrorBudgetBurnsFast": Case(jobs("0+3x200", "0+1x200"), jobs("0+0.1x200", "0+0.1x200")),  # 12 videos an hour
    "ErrorBudgetBurnsSlowly": Case(jobs("0+3x200", "0+0.06x200"), jobs("0+3x200", "0+0.02x200"), at="3h"),
    "ProbeFailing": Case(probe_at(4500), probe_at(6500)),
    "ServerDown": Case({'up{job="stiv"}': "1x60 0x200"}, {'up{job="stiv"}': "1x116 0x1 1x200"}),
    "QueueNotDraining": Case(
        {"stiv_queue_depth": "4x200", **jobs("0+1x60 60x200", "0x200")},
        {"stiv_queue_depth": "4x200", **jobs("0+1x200", "0x200")},
    ),
    "VideosSlow": Case(
        slow_videos(an_hour=30),
        slow_videos(an_hour=12),  # as slow, but too few to say so
        at="385m",
    ),
    "BlankFrames": Case(
        {"stiv_frames_total": "0+80x200", "stiv_blank_frames_total": "0+8x200"},
        {"stiv_frames_total": "0+1x200", "stiv_blank_frames_total": "0+1x200"},
    ),
    "DeadlinesMissed": Case(
        {"stiv_deadline_misses_total": "0+1x200", **jobs("0+3x200", "0x200")},
        {"stiv_deadline_misses_total": "0+0.1x200", **jobs("0+0.2x200", "0x200")},
    ),
    "CanaryStuck": Case(
        {"stiv_router_canary_weight_ratio": "0.1x800"},
        {"stiv_router_canary_weight_ratio": "0.1x200 0x5 0.1x400"},
        at="9h",
    ),
    "CanaryUnreachable": Case(
        {'stiv_router_requests_total{track="canary",status="none"}': "0x110 0+2x90"},
        {'stiv_router_requests_total{track="canary",status="none"}': "0+2x20 40x180"},
    ),
}


def series(values: Series) -> list[dict[str, str]]:
    return [{"series": name, "values": numbers} for name, numbers in values.items()]


def outcome(alert: str, case: Case, *, firing: bool) -> dict[str, Any]:
    """One of promtool's tests. Labels and words of an alert that fires are taken from the rule by promtool."""
    return {
        "interval": "1m",
        "input_series": series(case.firing if firing else case.silent),
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                "eval_time": case.at,
                "exp_samples": [{"labels": "{}", "value": 1 if firing else 0}],
            }
        ],
    }


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_the_rules_are_sound() -> None:
    assert f"{len(ALERTS) + len(RECORDED)} rules found" in promtool("check", "rules", str(RULES))


def test_each_alert_has_a_case_for_firing_and_one_for_silence() -> None:
    assert CASES.keys() == ALERTS.keys()


@needs_promtool
@pytest.mark.parametrize("name", ["stiv-training", "stiv-serving", "stiv-release"])
def test_each_alert_fires_where_it_must_and_is_silent_where_it_must(name: str, tmp_path: Path) -> None:
    """A group by itself: promtool evaluates every rule that it is given at every minute of every test."""
    needed = ("stiv-recording", name) if name == "stiv-serving" else (name,)
    groups = [group for group in GROUPS if group["name"] in needed]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    tests = [outcome(alert, CASES[alert], firing=firing) for alert in alerts for firing in (True, False)]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "2m", "tests": tests}))
    promtool("test", "rules", str(file))


def test_each_alert_says_how_urgent_it_is_and_where_its_runbook_section_is() -> None:
    lines = (ROOT / "docs" / "runbooks.md").read_text().splitlines()
    headings = {line.removeprefix("## ").lower() for line in lines if line.startswith("## ")}
    for alert, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("page", "ticket"), alert
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{alert.lower()}" and alert.lower() in headings, (
            alert
        )
        assert rule["annotations"]["summary"], alert
    assert headings == {alert.lower() for alert in ALERTS}, "the runbook has no section of an alert that is gone"


def test_rules_ask_only_for_what_there_is() -> None:
    known = {name for _, registry in PROCESSES.values() for name in exposed_names(registry)}
    for group in GROUPS:
        for rule in group["rules"]:
            assert set(re.findall(r"\bstiv_[a-z_]+", rule["expr"])) <= known, rule
            assert set(re.findall(r"\bstiv:[a-z0-9_:]+", rule["expr"])) <= RECORDED, rule
