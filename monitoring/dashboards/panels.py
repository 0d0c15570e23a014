"""What a dashboard is made of, and how it is written for Grafana; it does not know which there are.

It owns the form: a row of panels is a row of the page, a panel is one graph of one or several queries with a unit. Only
what Grafana 10 and later need is written.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["short", "s", "percentunit", "bytes", "ops", "reqps", "currencyUSD"]
WIDTH, HEIGHT = 24, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str = ""
    """Grafana's template, such as `{{instance}}`."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    says: str = ""
    """How to read it."""
    log: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    name: str
    title: str
    rows: tuple[tuple[Panel, ...], ...]
    constants: tuple[tuple[str, str], ...] = ()
    """Name and default of what a viewer may set, used in queries as `$name`."""

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row)

    def filled(self, expr: str) -> str:
        """The query with every constant's default."""
        for name, value in self.constants:
            expr = expr.replace(f"${name}", value)
        return expr


def to_grafana(dashboard: Dashboard) -> str:
    """JSON as Grafana imports and provisions it; the data source is chosen there."""
    panels: list[dict[str, Any]] = []
    for number, row in enumerate(dashboard.rows):
        width = WIDTH // len(row)
        for place, panel in enumerate(row):
            at = {"h": HEIGHT, "w": width, "x": place * width, "y": number * HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, at))
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        *({"name": name, "type": "textbox", "query": value, "label": name} for name, value in dashboard.constants),
    ]
    tree = {
        "uid": f"stiv-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["stiv"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }
    return json.dumps(tree, indent=1) + "\n"


def _panel(number: int, panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": DATASOURCE,
        "gridPos": at,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": {"scaleDistribution": scale, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "expr": query.expr,
                "legendFormat": query.legend,
                "datasource": DATASOURCE,
            }
            for place, query in enumerate(panel.queries)
        ],
    }
