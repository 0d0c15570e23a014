"""`stiv`: each command loads a recipe or a ref and calls one function."""

import getpass
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.catalog import recipe_path
from infra.registry import GateReport, Registry, evaluate_gate
from infra.store import open_store
from model.recipe import Curriculum, dumps, load, loads_stage

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

StoreOption = Annotated[str, typer.Option(help="artifact store: a folder or s3://bucket/prefix")]
WorkOption = Annotated[Path, typer.Option(help="folder for this machine's copies and results")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.section.key=value; stage may be *")]
RecipeArgument = Annotated[str, typer.Argument(help="built-in curriculum or path of a curriculum.toml")]


@app.command()
def recipe(name: RecipeArgument = "tiny", overrides: SetOption = None) -> None:
    """Print a curriculum's resolved tree as JSON."""
    print(dumps(_load(name, overrides)))


@app.command()
def ingest(
    name: RecipeArgument = "tiny",
    videos: Annotated[Path | None, typer.Option(help="folder of video files, each with VIDEO.json beside it")] = None,
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/ingest"),
) -> None:
    """Write and promote the data set and the codec of a curriculum."""
    from infra.ingest import ingest as run

    done = run(_registry(store), _load(name, None), work, videos=videos, who=getpass.getuser())
    _print_figures("data set and codec", done.codec.metrics)


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="stage of the curriculum, its parent promoted already")],
    name: Annotated[str, typer.Option("--recipe", help="built-in curriculum or path of a curriculum.toml")] = "tiny",
    overrides: SetOption = None,
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/work/by-hand"),
) -> None:
    """Train one stage, evaluate it and promote it through its gate; the curriculum flow does this for all."""
    from flows.watch import StageDisplay
    from infra.launch.stage import run_stage

    wanted = _load(name, overrides).stage(stage)
    with StageDisplay(console) as display:
        outcome = run_stage(
            wanted,
            _registry(store),
            work,
            who=getpass.getuser(),
            on_progress=lambda lines: display.show(stage, wanted.training.total_steps, lines),
        )
    _print_gate(outcome.gate)


@app.command()
def export(
    ref: Annotated[str, typer.Argument(help="ref or digest of a checkpoint")] = "ti2v/promoted",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/export"),
) -> None:
    """Export a checkpoint to ONNX, prove it equal to PyTorch and move engine/candidate."""
    from infra.engines import export_engine

    done = export_engine(_registry(store), ref, work, who=getpass.getuser())
    table = Table("shape", "max abs error", "bound", title=f"engine {done.manifest.digest[:16]}")
    for row in done.parity.shapes:
        table.add_row(str(row.shape), f"{row.max_abs_error:.2e}", f"{done.parity.bound:g}")
    console.print(table)


@app.command()
def serve(
    ref: Annotated[str, typer.Argument(help="ref or digest of an engine")] = "engine/candidate",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/serving"),
    host: Annotated[
        str, typer.Option(help="address to listen on; other than loopback needs STIV_API_KEYS")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
) -> None:
    """Serve an engine with the OpenAI videos API until SIGTERM."""
    from infra.serving.server import serve as run
    from infra.serving.settings import ServerSettings

    registry = _registry(store)
    engine = registry.resolve(ref)
    settings = ServerSettings.from_environment(
        os.environ,
        engine=registry.fetch(engine, work / "engines" / engine.digest[:16]),
        database_url=f"sqlite:///{work.absolute()}/jobs.db",
        store_url=str(work / "videos"),
        host=host,
        port=port,
    )
    run(settings)


@app.command()
def promote(
    digest: Annotated[str, typer.Argument(help="digest of a published artifact")],
    ref: Annotated[str, typer.Argument(help="ref to move, such as t2v/promoted")],
    why: Annotated[str, typer.Option(help="reason, kept in the log")],
    override: Annotated[str | None, typer.Option(help="reason to pass over a failed gate; visible for ever")] = None,
    store: StoreOption = "runs/store",
) -> None:
    """Point a ref at an artifact, through the gate of its recipe."""
    from infra.engines import PARITY_GATE

    registry = _registry(store)
    manifest = registry.resolve(digest)
    if manifest.kind == "checkpoint":
        rules = loads_stage(json.dumps(manifest.recipe)).gate
    elif manifest.kind == "engine":
        rules = PARITY_GATE
    else:
        raise ValueError(
            f"{digest} is a {manifest.kind}, which `stiv ingest` promotes; only checkpoints and engines here"
        )
    gate = evaluate_gate(rules, manifest.metrics)
    _print_gate(gate)
    moved = registry.promote(ref, manifest.digest, gate, who=getpass.getuser(), why=why, override=override)
    console.print(f"{ref} -> {moved.digest} (generation {moved.generation})")


@app.command()
def history(ref: str, store: StoreOption = "runs/store") -> None:
    """Every move of a ref, newest first."""
    table = Table("generation", "digest", "when", "who", "why", "override")
    for move in _registry(store).history(ref):
        table.add_row(
            str(move.generation),
            move.digest[:16],
            f"{move.when:%Y-%m-%d %H:%M}",
            move.who,
            move.why,
            move.override or "",
        )
    console.print(table)


def main() -> None:
    """Run a command; an error a user can mend is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("STIV_TRACEBACK"):
            raise
        print(f"stiv: {error}", file=sys.stderr)
        sys.exit(1)


def _load(name: str, overrides: list[str] | None) -> Curriculum:
    return load(recipe_path(name), overrides or [])


def _registry(store: str) -> Registry:
    return Registry(open_store(store))


def _print_figures(title: str, figures: dict[str, float]) -> None:
    table = Table("figure", "value", title=title)
    for name, value in sorted(figures.items()):
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def _print_gate(gate: GateReport) -> None:
    table = Table("gate", "verdict")
    for rule in gate.rules:
        table.add_row(rule.reason, "passed" if rule.passed else "failed")
    console.print(table)


if __name__ == "__main__":
    main()
