"""The reference page of all metrics, written from the metrics themselves: `python -m monitoring.reference > FILE`.

It owns the page's form; it knows nothing of what the metrics mean.
"""

from collections.abc import Iterator
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from monitoring import metrics

PROCESSES: dict[str, tuple[str, CollectorRegistry]] = {
    "Training": ("rank 0 of a stage, on the port in `WORK/STAGE/metrics_port`", metrics.TRAINING),
    "Pipeline": ("the process that promotes, exports and releases", metrics.PIPELINE),
    "Serving": ("each server, at `/metrics`", metrics.SERVING),
    "Routing": ("the local router, at `/router/metrics`", metrics.ROUTING),
    "Probing": ("`stiv rollout probe`", metrics.PROBING),
}


def page() -> str:
    """Markdown."""
    parts = [
        "# Metrics",
        "",
        "Written by `python -m monitoring.reference > docs/metrics.md`; a test holds it to the code.",
        "",
    ]
    for title, (where, registry) in PROCESSES.items():
        parts += [
            f"## {title}",
            "",
            f"Shown by {where}.",
            "",
            "| metric | type | labels | meaning |",
            "| --- | --- | --- | --- |",
        ]
        parts += [*_rows(registry), ""]
    return "\n".join(parts)


def exposed_names(registry: CollectorRegistry) -> Iterator[str]:
    """Every name that a query can ask for."""
    for family in registry.collect():
        if family.type == "counter":
            yield f"{family.name}_total"
        elif family.type == "histogram":
            yield from (f"{family.name}_{part}" for part in ("bucket", "count", "sum"))
        else:
            yield family.name


def _rows(registry: CollectorRegistry) -> Iterator[str]:
    shown = {family.name for family in registry.collect()}
    for constant, metric in vars(metrics).items():
        if constant.startswith("_") or not isinstance(metric, Counter | Gauge | Histogram):
            continue
        (family,) = metric.describe()
        if family.name not in shown:
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        facts = cast("Any", metric)  # the library gives no other way to labels and buckets
        labels = ", ".join(f"`{label}`" for label in facts._labelnames)
        words = family.documentation
        if isinstance(metric, Histogram):
            edges = facts._upper_bounds
            words += f" Buckets from {edges[0]:g} to {edges[-2]:g}."
        yield f"| `{name}` | {family.type} | {labels} | {words} |"


if __name__ == "__main__":
    print(page(), end="")
