"""Dashboards are what the code says, ask only for what there is, and a real Prometheus takes every query."""

import json
import re
import shutil
from pathlib import Path

import pytest

from infra.rollout.observer import start_prometheus
from infra.rollout.prometheus import Prometheus
from monitoring.dashboards.catalog import DASHBOARDS, FOLDER
from monitoring.dashboards.panels import Dashboard, to_grafana
from monitoring.reference import PROCESSES, exposed_names
from tests.test_rules import RECORDED, RULES

KNOWN = {name for _, registry in PROCESSES.values() for name in exposed_names(registry)} | RECORDED


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.name)
def test_the_file_is_what_the_code_says(dashboard: Dashboard) -> None:
    text = (FOLDER / f"{dashboard.name}.json").read_text()
    assert text == to_grafana(dashboard), "run `python -m monitoring.dashboards.catalog`"
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(dashboard.panels)
    assert max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in panels) <= 24


def test_queries_ask_only_for_what_there_is_and_every_metric_is_seen_somewhere() -> None:
    asked = {
        name for each in DASHBOARDS for panel in each.panels for query in panel.queries for name in names(query.expr)
    }
    assert asked <= KNOWN
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} | asked
    unseen = {
        name
        for name in KNOWN - RECORDED
        if re.sub(r"_(bucket|sum|count)$", "", name) not in families and name not in families
    }
    assert unseen <= {
        "stiv_training_samples_total",
        "stiv_job_seconds_bucket",
        "stiv_job_seconds_sum",
        "stiv_job_seconds_count",
    }


def names(expr: str) -> list[str]:
    return re.findall(r"\bstiv[_:][a-z0-9_:]+", expr)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no `prometheus` on this machine")
def test_a_real_prometheus_takes_every_query_and_the_rules(tmp_path: Path) -> None:
    url, process = start_prometheus(tmp_path, interval_s=5, rules=RULES)
    prometheus = Prometheus(url)
    try:
        for dashboard in DASHBOARDS:
            for panel in dashboard.panels:
                for query in panel.queries:
                    assert prometheus.query(dashboard.filled(query.expr)) == [], "nothing is scraped here"
    finally:
        prometheus.close()
        process.stop(patience_s=30)
