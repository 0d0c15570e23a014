"""The tables that several commands print; it does not know where figures come from."""

import json
from collections.abc import Mapping

from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from infra.registry.difference import Change, Difference
from infra.registry.records import GateReport

console = Console()


def print_figures(title: str, figures: Mapping[str, float]) -> None:
    table = Table("figure", "value", title=title)
    for name, value in sorted(figures.items()):
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def print_gate(gate: GateReport) -> None:
    table = Table("gate", "verdict")
    for rule in gate.rules:
        table.add_row(rule.reason, "passed" if rule.passed else "failed")
    console.print(table)


def print_changes(found: Difference) -> None:
    """A line a name that differs, by subject."""
    table = Table("what", "name", found.before[:16], found.after[:16], "change")
    for subject, changes in found.subjects.items():
        for change in changes:
            table.add_row(subject, change.name, _short(change.before), _short(change.after), _step(change))
    console.print(table if table.row_count else "they differ in nothing but when they were made")


def size_of(count: int) -> str:
    """Bytes as people read them."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _short(value: JsonValue) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:16] if len(text) == 64 else text


def _step(change: Change) -> str:
    before, after = change.before, change.after
    if not isinstance(before, int | float) or not isinstance(after, int | float) or isinstance(before, bool):
        return ""
    return f"{after - before:+.4g}"
