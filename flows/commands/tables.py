"""The tables that several commands print; it does not know where figures come from."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

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
