"""The engines' commands: export, list, inspect, verify, refit. What they do is `infra.engines`'s."""

import getpass
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from flows.catalog import target_path
from flows.commands.options import JsonOption, StoreOption, WorkOption, open_registry
from flows.commands.tables import console

if TYPE_CHECKING:
    from export.parity.report import ParityReport
    from export.tensorrt.listeners import BuildStep, OnProgress
    from infra.engines.export import ExportedEngine

app = typer.Typer()
engine = typer.Typer(no_args_is_help=True, help="Published engines (docs/export.md).")
app.add_typer(engine, name="engine")

EngineArgument = Annotated[str, typer.Argument(help="ref or digest of an engine")]
WORK = Path("runs/export")


@app.command()
def export(
    ref: Annotated[str, typer.Argument(help="ref or digest of a checkpoint")] = "ti2v/promoted",
    target: Annotated[str, typer.Option(help="built-in target (cpu, cuda, torch, rtx, tensorrt) or its TOML file")] = (
        "cpu"
    ),
    store: StoreOption = "runs/store",
    work: WorkOption = WORK,
) -> None:
    """Export a checkpoint, prove it equal to PyTorch and move engine/candidate; identical inputs reuse what stands."""
    from export.engines.targets import load_target
    from infra.engines.export import export_engine

    wanted = load_target(target_path(target))
    with _build_bar() as on_progress:
        done = export_engine(
            open_registry(store), ref, work, who=getpass.getuser(), target=wanted, on_progress=on_progress
        )
    _show(done)


@engine.command("list")
def list_engines(store: StoreOption = "runs/store") -> None:
    """Every published engine, newest first, with the refs that point at it."""
    from infra.engines.listing import list_engines as run

    table = Table("engine", "stage", "runtime", "precision", "error / bound", "refs", "created")
    for row in run(open_registry(store)):
        error = "unproven" if row.error_over_bound is None else f"{row.error_over_bound:.2f}"
        created = f"{row.created_at:%Y-%m-%d %H:%M}"
        table.add_row(row.digest[:16], row.stage, row.runtime, row.precision, error, ", ".join(row.refs), created)
    console.print(table)


@engine.command()
def inspect(
    ref: EngineArgument = "engine/candidate",
    store: StoreOption = "runs/store",
    work: WorkOption = WORK,
    as_json: JsonOption = False,
) -> None:
    """What an engine is, where it comes from, whether it runs here, and what TensorRT says of a plan on its GPU."""
    from infra.engines.listing import inspect_engine

    facts = inspect_engine(open_registry(store), ref, work)
    if as_json:
        print(facts.model_dump_json(indent=2))
        return
    table = Table("fact", "value", title=f"engine {facts.digest[:16]}")
    for name, value in facts.rows():
        table.add_row(name, value)
    console.print(table)


@engine.command()
def verify(
    ref: EngineArgument = "engine/candidate", store: StoreOption = "runs/store", work: WorkOption = WORK
) -> None:
    """Compare an engine with its checkpoint on this machine; a plan that was built elsewhere is proven and promoted."""
    from infra.engines.verify import is_proven, prove_plan, verify_engine

    registry = open_registry(store)
    if is_proven(registry, ref):
        _show_parity(f"engine {ref}", verify_engine(registry, ref, work))
    else:
        _show(prove_plan(registry, ref, work, who=getpass.getuser()))


@engine.command()
def refit(
    checkpoint: Annotated[str, typer.Argument(help="ref or digest of the checkpoint whose weights go in")],
    ref: EngineArgument = "engine/candidate",
    store: StoreOption = "runs/store",
    work: WorkOption = WORK,
) -> None:
    """Publish an engine around another checkpoint's weights: proven and promoted, with no trace and no build."""
    from infra.engines.refit import refit_engine

    _show(refit_engine(open_registry(store), ref, checkpoint, work, who=getpass.getuser()))


def _show(done: "ExportedEngine") -> None:
    title = f"engine {done.manifest.digest[:16]}{', reused' if done.reused else ''}"
    if done.parity is not None:
        _show_parity(title, done.parity)
        return
    console.print(
        f"{title}: built, not proven and not promoted, for this machine cannot run it; on one that can:"
        f" stiv engine verify {done.manifest.digest}",
        soft_wrap=True,
    )


def _show_parity(title: str, parity: "ParityReport") -> None:
    table = Table("check", "found", "bound", title=f"{title}, {parity.precision}")
    for check in parity.checks():
        table.add_row(check.what, f"{check.found:.3g}", f"{check.bound:g}")
    console.print(table)


@contextmanager
def _build_bar() -> "Generator[OnProgress]":
    """A progress bar of the builder's own phases, there while a plan is built."""
    with Progress(console=console, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def show(step: "BuildStep") -> None:
            if step.phase not in bars:
                indent = "" if step.parent is None else "  "
                bars[step.phase] = progress.add_task(f"{indent}{step.phase}", total=step.total)
            progress.update(bars[step.phase], completed=step.done, total=step.total)

        yield show
