"""`stiv launch`, `attach`, `status`, `logs`, `cancel`, `cluster`: stages on Kubernetes (docs/cluster.md)."""

import getpass
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.catalog import recipe_path
from flows.commands.options import JsonOption, open_registry
from flows.commands.tables import console
from infra.cluster.client import ClusterClient, ClusterError
from infra.cluster.config import ClusterConfig, load_cluster
from infra.cluster.diagnosis import diagnose, explain
from infra.cluster.follow import Look
from infra.cluster.gang import ClusterGang
from infra.cluster.journal import GangJournal
from infra.cluster.request import GangRequest
from infra.cluster.setup.check import check as asked_of
from infra.cluster.setup.foundations import foundations
from infra.cluster.stage import request_for, train_on_cluster
from infra.registry.registry import Registry
from model.recipe import load

app = typer.Typer()
setup = typer.Typer(no_args_is_help=True, help="What a cluster needs before gangs run on it (docs/cluster.md).")
app.add_typer(setup, name="cluster")

StageArgument = Annotated[str, typer.Argument(help="stage of the curriculum")]
RecipeOption = Annotated[str, typer.Option("--recipe", help="built-in curriculum or path of a curriculum.toml")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.section.key=value; stage may be *")]
ClusterOption = Annotated[Path, typer.Option("--cluster", help="cluster.toml: where and on what it runs")]
KubeconfigOption = Annotated[str | None, typer.Option(help="KUBECONFIG or ~/.kube/config unless said")]


@dataclass(slots=True, frozen=True)
class _Asked:
    """What a command is about."""

    request: GangRequest
    registry: Registry
    client: ClusterClient


@app.command()
def launch(
    stage: StageArgument,
    recipe: RecipeOption = "tiny",
    overrides: SetOption = None,
    cluster: ClusterOption = Path("cluster.toml"),
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Train a stage on Kubernetes: start its gang or attach to it, follow it, promote what it published."""
    with _asking(stage, recipe, overrides, cluster, kubeconfig) as asked:
        _follow(asked, start=True)


@app.command()
def attach(
    stage: StageArgument,
    recipe: RecipeOption = "tiny",
    overrides: SetOption = None,
    cluster: ClusterOption = Path("cluster.toml"),
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Follow a gang that runs, and promote what it publishes; as `launch`, but it starts nothing."""
    with _asking(stage, recipe, overrides, cluster, kubeconfig) as asked:
        _follow(asked, start=False)


@app.command()
def status(
    stage: StageArgument,
    recipe: RecipeOption = "tiny",
    overrides: SetOption = None,
    cluster: ClusterOption = Path("cluster.toml"),
    kubeconfig: KubeconfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say where a gang stands, how far it is, and what stands in its way."""
    with _asking(stage, recipe, overrides, cluster, kubeconfig) as asked:
        gang = ClusterGang(asked.client, asked.request)
        standing = gang.refresh()
        restarts = gang.carried().restarts + standing.restarts
        progress = GangJournal(asked.registry.store, asked.request.name).progress()
        waits = standing.state in ("pending", "starting", "restarting", "suspended")
        pods = gang.view.pods.values()
        finding = diagnose(asked.request.cluster, pods, gang.events(), gang.cluster_nodes()) if waits else None
        look = Look(standing, restarts, progress, finding)
        if as_json:
            told = {"name": asked.request.name, **asdict(standing), "restarts": restarts}
            told["progress"] = None if progress is None else progress.model_dump()
            told["finding"] = None if finding is None else finding.what
            print(json.dumps(told, indent=2))
        else:
            console.print(f"{asked.request.name}: {line_of(look)}", soft_wrap=True)


@app.command()
def logs(
    stage: StageArgument,
    recipe: RecipeOption = "tiny",
    overrides: SetOption = None,
    cluster: ClusterOption = Path("cluster.toml"),
    kubeconfig: KubeconfigOption = None,
    node: Annotated[int, typer.Option(min=0, help="by its index in the gang")] = 0,
    lines: Annotated[int, typer.Option(min=1)] = 100,
) -> None:
    """Print the end of a node's log; ranks' own logs lie in the run folder."""
    with _asking(stage, recipe, overrides, cluster, kubeconfig) as asked:
        gang = ClusterGang(asked.client, asked.request)
        gang.refresh()
        print(asked.client.log(asked.request.cluster.namespace, gang.pod(node), lines=lines), end="")


@app.command()
def cancel(
    stage: StageArgument,
    recipe: RecipeOption = "tiny",
    overrides: SetOption = None,
    cluster: ClusterOption = Path("cluster.toml"),
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Delete a gang once its ranks have saved; `launch` goes on from that checkpoint."""
    with _asking(stage, recipe, overrides, cluster, kubeconfig) as asked:
        gang = ClusterGang(asked.client, asked.request)
        gang.refresh()
        gang.terminate()
        console.print(f"{asked.request.name}: deleted", soft_wrap=True)


@setup.command()
def check(
    cluster: Annotated[Path, typer.Argument(help="cluster.toml")] = Path("cluster.toml"),
    kubeconfig: KubeconfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the cluster for all that a gang needs; exit code 1 if something needed is missing."""
    config = load_cluster(cluster)
    answers = list(asked_of(ClusterClient.connect(kubeconfig), config))
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2))
    else:
        table = Table("about", "", "what")
        for answer in answers:
            table.add_row(answer.about, "good" if answer.good else "missing", answer.told)
        console.print(table)
    if any(answer.needed and not answer.good for answer in answers):
        raise typer.Exit(1)


@setup.command()
def bootstrap(
    cluster: Annotated[Path, typer.Argument(help="cluster.toml")] = Path("cluster.toml"),
    kubeconfig: KubeconfigOption = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="quota of the namespace; none unless said")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="the server checks, and changes nothing")] = False,
) -> None:
    """Make namespace, accounts, role, network policies and quota; the same again changes nothing."""
    config = load_cluster(cluster)
    client = ClusterClient.connect(kubeconfig)
    try:
        for kind, thing in foundations(config, gpus=gpus):
            client.apply(kind, thing, dry_run=dry_run)
            console.print(f"{kind.name} {thing['metadata']['name']}", soft_wrap=True)
    except ClusterError as error:
        raise ValueError(explain(error, config)) from error


def line_of(look: Look) -> str:
    """A look as one line."""
    standing, progress = look.standing, look.progress
    parts = [standing.state, f"{standing.running} of {standing.nodes} nodes run"]
    if look.restarts:
        parts.append(f"{look.restarts} restarts, {standing.crashes} of them crashes")
    if progress is not None:
        parts.append(f"step {progress.step} of {progress.total_steps}, saved at {progress.checkpoint_step}")
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.3f}")
        if progress.seconds_left:
            parts.append(f"{progress.seconds_left / 3600:.1f} h left")
    if look.finding is not None:
        parts.append(look.finding.what)
    if standing.why:
        parts.append(standing.why)
    return "; ".join(parts)


def _follow(asked: _Asked, *, start: bool) -> None:
    shown = ""

    def show(look: Look) -> None:
        nonlocal shown
        line = line_of(look)
        if line != shown:
            console.print(f"{asked.request.name}: {line}", soft_wrap=True)
        shown = line

    who = getpass.getuser()
    ref = train_on_cluster(asked.client, asked.request, asked.registry, who=who, start=start, on_look=show)
    console.print(f"{ref.name} -> {ref.digest}", soft_wrap=True)


@contextmanager
def _asking(
    stage: str, recipe: str, overrides: list[str] | None, cluster: Path, kubeconfig: str | None
) -> Generator[_Asked]:
    """Recipe, registry and API server of a command; what the server refuses is told with the way out."""
    config: ClusterConfig = load_cluster(cluster)
    wanted = load(recipe_path(recipe), overrides or []).stage(stage)
    client = ClusterClient.connect(kubeconfig)
    registry = open_registry(config.store)
    try:
        yield _Asked(request_for(wanted, registry, config), registry, client)
    except ClusterError as error:
        raise ValueError(explain(error, config)) from error
