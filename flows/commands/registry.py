"""The registry's commands: promote and look back. What they do is `infra.registry`'s."""

import getpass
from typing import Annotated

import typer
from rich.table import Table

from flows.commands.options import StoreOption, open_registry
from flows.commands.tables import console, print_gate

app = typer.Typer()


@app.command()
def promote(
    artifact: Annotated[str, typer.Argument(help="digest of a published artifact, or a ref that points at it")],
    ref: Annotated[str, typer.Argument(help="ref to move, such as t2v/promoted")],
    why: Annotated[str, typer.Option(help="reason, kept in the log")],
    override: Annotated[str | None, typer.Option(help="reason to pass over a failed gate; visible for ever")] = None,
    store: StoreOption = "runs/store",
) -> None:
    """Point a ref at an artifact, through the gate it was published with."""
    registry = open_registry(store)
    manifest = registry.resolve(artifact)
    moved = registry.promote(ref, manifest.digest, who=getpass.getuser(), why=why, override=override)
    print_gate(moved.gate)
    console.print(f"{ref} -> {moved.digest} (generation {moved.generation})")


@app.command()
def history(ref: str, store: StoreOption = "runs/store") -> None:
    """Every move of a ref, newest first."""
    table = Table("generation", "digest", "when", "who", "why", "override")
    for move in open_registry(store).history(ref):
        table.add_row(
            str(move.generation),
            move.digest[:16],
            f"{move.when:%Y-%m-%d %H:%M}",
            move.who,
            move.why,
            move.override or "",
        )
    console.print(table)
