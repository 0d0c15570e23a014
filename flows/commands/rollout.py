"""The local servers' commands: start, look, promote, abort, undo. What they do is `infra.rollout`'s."""

import getpass
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.commands.options import JsonOption, StoreOption, TrustOption, open_registry
from flows.commands.tables import console

if TYPE_CHECKING:
    from infra.rollout.home import Home

rollout = typer.Typer(
    no_args_is_help=True, help="The servers of this machine: stable, canary, router, Prometheus (docs/release.md)."
)

HomeOption = Annotated[Path, typer.Option(help="folder of the servers")]
PrometheusOption = Annotated[str | None, typer.Option(help="one that reads the servers already; else one is started")]
WhyOption = Annotated[str, typer.Option(help="reason, kept in the log of the ref")]
HOME = Path("runs/home")


@rollout.command()
def up(
    home: HomeOption = HOME,
    port: Annotated[int, typer.Option(help="of the router, where users ask")] = 8000,
    store: StoreOption = "runs/store",
    trust: TrustOption = None,
    prometheus: PrometheusOption = None,
) -> None:
    """Serve release/stable behind the router, until `stiv rollout down`."""
    from flows.fleet import open_home
    from infra.rollout.release import STABLE

    digest = open_registry(store, trust).resolve(STABLE).digest
    fleet = open_home(home, store, _environment(trust), prometheus=prometheus, port=port)
    fleet.up(digest)
    console.print(
        f"{fleet.url}/v1/videos: engine {digest[:16]}; Prometheus: {fleet.state.prometheus_url}", soft_wrap=True
    )


@rollout.command()
def down(home: HomeOption = HOME) -> None:
    """Stop the servers; running videos may finish, the others stay in the queue."""
    _home(home).down()
    console.print("stopped")


@rollout.command()
def status(home: HomeOption = HOME, as_json: JsonOption = False) -> None:
    """What serves which engine, and how a canary fares."""
    fleet = _home(home)
    state, standing, weight = fleet.state, fleet.standing(), fleet.weight()
    rows = {"stable": (state.stable, 100 - weight)}
    if state.canary is not None:
        rows["canary"] = (state.canary, weight)
    if as_json:
        servers = {name: {"engine": one.engine, "url": one.url, "weight": share} for name, (one, share) in rows.items()}
        print(json.dumps({"url": fleet.url, "prometheus": state.prometheus_url, "servers": servers}, indent=2))
        return
    table = Table("track", "engine", "address", "new videos", title=fleet.url)
    for name, (one, share) in rows.items():
        table.add_row(name, one.engine[:16], one.url, f"{share} %")
    console.print(table)
    if state.canary is not None:
        words = "ready" if standing.ready else "not ready"
        console.print(f"the canary is {words}, and was started anew {standing.restarts} times")


@rollout.command()
def promote(
    why: WhyOption, home: HomeOption = HOME, store: StoreOption = "runs/store", trust: TrustOption = None
) -> None:
    """Make the canary stable now, whatever its analysis says; the release that leads it sees that and ends."""
    from infra.rollout.release import STABLE

    fleet, registry = _home(home, store, trust), open_registry(store, trust)
    engine = fleet.canary_engine
    if engine is None:
        raise ValueError("there is no canary to promote; a release starts one (docs/release.md)")
    registry.promote(STABLE, engine, who=getpass.getuser(), why=why)
    fleet.promote()
    console.print(f"{STABLE} -> {engine}", soft_wrap=True)


@rollout.command()
def abort(home: HomeOption = HOME) -> None:
    """Take the canary out of service now; release/stable stays as it is."""
    fleet = _home(home)
    engine = fleet.canary_engine
    if engine is None:
        raise ValueError("there is no canary to abort; `stiv rollout undo` goes back to the release before")
    fleet.abort()
    console.print(f"the canary of engine {engine[:16]} drains; stable serves {fleet.stable_engine[:16]}")


@rollout.command()
def undo(why: WhyOption, home: HomeOption = HOME, store: StoreOption = "runs/store", trust: TrustOption = None) -> None:
    """Go back to the release before: the ref, then the servers, without a break in service."""
    from infra.rollout.release import STABLE

    fleet, registry = _home(home, store, trust), open_registry(store, trust)
    if fleet.canary_engine is not None:
        raise ValueError("a canary stands beside stable; `stiv rollout abort` it first, then undo")
    moved = registry.rollback(STABLE, who=getpass.getuser(), why=why)
    try:
        fleet.replace_stable(moved.digest)
    except RuntimeError:
        registry.rollback(
            STABLE, who=getpass.getuser(), why="the release before did not come up", to=moved.generation - 1
        )
        raise
    console.print(f"{STABLE} -> {moved.digest} (generation {moved.generation})", soft_wrap=True)


@rollout.command()
def probe(
    url: Annotated[str, typer.Argument(help="address of the router or of a server; STIV_API_KEYS gives the key")],
    every: Annotated[float, typer.Option(min=1, help="seconds from one synthetic video to the next")] = 300.0,
    port: Annotated[int, typer.Option(help="of /metrics")] = 9464,
) -> None:
    """Ask for one small video again and again, and show on /metrics how that goes."""
    import threading

    from infra.rollout.probe import ProbeSettings, watch
    from monitoring import logs, metrics

    logs.configure()
    exporter = metrics.start_exporter(port, metrics.PROBING)
    console.print(f"http://127.0.0.1:{exporter.port}/metrics", soft_wrap=True)
    key = os.environ.get("STIV_API_KEYS", "").partition(",")[0].strip() or None
    watch(url, key, ProbeSettings(num_inference_steps=4), every_s=every, stop=threading.Event())


def _home(folder: Path, store: str = "runs/store", trust: Path | None = None) -> "Home":
    from flows.fleet import open_home

    return open_home(folder, store, _environment(trust))


def _environment(trust: Path | None) -> dict[str, str]:
    return {**os.environ, **({"STIV_TRUST": str(trust.absolute())} if trust else {})}
