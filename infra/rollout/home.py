"""The local home: stable, canary, router and Prometheus as processes of this machine that outlive whoever starts them.

It owns these processes and the folder that says which they are; it knows nothing of verdicts or registries. To a
release it is what two Deployments, a Service and an HTTPRoute are in a cluster.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from infra.rollout.analysis import Standing
from infra.rollout.observer import free_port, start_prometheus, write_targets
from infra.rollout.probe import Backends
from infra.rollout.process import Process, wait_until_answers
from infra.rollout.routes import ROUTES, Routes, read_routes
from infra.serving.jobs.store import JobStore
from infra.serving.jobs.table import Track
from model.config import Config

STATE = "home.json"
READY_S = 900.0
"""How long a server may take to load and warm up."""

Command = Callable[[str, int], Sequence[str]]
"""(digest of the engine, port) -> the command line of a server."""


class Server(Config):
    track: Track
    engine: str
    """Digest."""
    port: int
    keeper: Process
    state: str
    """File of the keeper, in the home."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class HomeState(Config):
    """What runs, as the folder says."""

    stable: Server
    canary: Server | None = None
    router: Process
    router_port: int
    prometheus: Process | None = None
    prometheus_url: str
    made: int = 1
    """Servers started so far: each has files of its own."""


class KeeperState(Config):
    """What a keeper writes."""

    keeper: int
    pid: int | None
    restarts: int
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class HomeSettings:
    command: Command
    environment: Mapping[str, str]
    database_url: str
    """Of the jobs that all servers share."""
    router_port: int = 0
    """0 takes a free one."""
    prometheus_url: str | None = None
    """One that reads these servers already; else one is started here."""
    scrape_every_s: float = 5.0
    key: str | None = None
    """API key for the probe."""
    drain_s: float = 60.0
    """Until a leaving server is killed."""


class Home:
    """A fleet of one machine, see `canary.Fleet`."""

    def __init__(self, folder: Path, settings: HomeSettings) -> None:
        self.folder = folder.absolute()
        self.settings = settings

    @property
    def is_up(self) -> bool:
        return (self.folder / STATE).exists()

    @property
    def state(self) -> HomeState:
        if not self.is_up:
            raise ValueError(f"nothing runs in {self.folder}; `stiv rollout up` starts stable, router and Prometheus")
        return HomeState.model_validate_json((self.folder / STATE).read_bytes())

    @property
    def url(self) -> str:
        """Where users ask."""
        return f"http://127.0.0.1:{self.state.router_port}"

    @property
    def stable_engine(self) -> str:
        return self.state.stable.engine

    @property
    def canary_engine(self) -> str | None:
        canary = self.state.canary
        return None if canary is None else canary.engine

    def up(self, engine: str) -> None:
        """Start a stable server of `engine`, the router and Prometheus; in a home that is up nothing happens."""
        if self.is_up:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        stable = self._start("stable", engine, 1)
        self._await_ready(stable)
        Routes(stable=stable.url).write(self.folder / ROUTES)
        port = self.settings.router_port or free_port()
        router = self._spawn([sys.executable, "-m", "infra.rollout.router", str(self.folder), str(port)], "router")
        wait_until_answers(f"http://127.0.0.1:{port}/router/metrics", router, self.folder / "router.log")
        prometheus, url = None, self.settings.prometheus_url
        if url is None:
            url, prometheus = start_prometheus(self.folder / "prometheus", interval_s=self.settings.scrape_every_s)
        self._write(
            HomeState(
                stable=stable,
                router=router,
                router_port=port,
                prometheus=prometheus,
                prometheus_url=url,
            )
        )

    def start_canary(self, engine: str) -> None:
        """A canary beside stable, with no request yet; the one that runs, if it is of that engine."""
        state = self.state
        if state.canary is not None:
            if state.canary.engine == engine and state.canary.keeper.find():
                return
            self.abort()
            state = self.state
        canary = self._start("canary", engine, state.made + 1)
        self._write(state.model_copy(update={"canary": canary, "made": state.made + 1}))

    def await_canary(self, patience_s: float = READY_S) -> bool:
        """Whether it came to be ready; False as soon as it is seen to be started anew."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            standing = self.standing()
            if standing.ready or standing.restarts:
                return standing.ready
            time.sleep(0.2)
        return False

    def set_weight(self, percent: int) -> None:
        """Percent of new videos for the canary."""
        state = self.state
        if state.canary is None:
            raise ValueError("there is no canary to give requests to; a release starts one")
        Routes(stable=state.stable.url, canary=state.canary.url, canary_weight=percent).write(self.folder / ROUTES)

    def weight(self) -> int:
        return read_routes(self.folder / ROUTES).canary_weight

    def standing(self) -> Standing:
        canary = self.state.canary
        if canary is None:
            return Standing(ready=False, restarts=0)
        return Standing(ready=_is_ready(canary.url), restarts=self._keeper(canary).restarts)

    def backends(self) -> Backends:
        state = self.state
        if state.canary is None:
            raise ValueError("there is no canary to probe; a release starts one")
        return Backends(state.stable.url, state.canary.url, self.settings.key)

    def promote(self) -> None:
        """A new stable server of the canary's engine takes over; canary and old stable drain.

        Raises:
            RuntimeError: the new one does not become ready; then all is as it was.
        """
        canary = self.state.canary
        if canary is None:
            raise ValueError("there is no canary to promote; a release starts one")
        self.replace_stable(canary.engine)
        self.abort()

    def replace_stable(self, engine: str) -> None:
        """Serve `engine` as stable: started first, then given all requests, then the old one drains."""
        state = self.state
        new = self._start("stable", engine, state.made + 1)
        try:
            self._await_ready(new)
        except RuntimeError:
            new.keeper.stop(self.settings.drain_s)
            raise
        routes = read_routes(self.folder / ROUTES)
        routes.model_copy(update={"stable": new.url}).write(self.folder / ROUTES)
        self._write(state.model_copy(update={"stable": new, "made": state.made + 1}))
        state.stable.keeper.stop()

    def abort(self) -> None:
        """No request goes to the canary any more, what waited for it is stable's, and it drains by itself."""
        state = self.state
        if state.canary is None:
            return
        Routes(stable=state.stable.url).write(self.folder / ROUTES)
        state.canary.keeper.stop()
        jobs = JobStore(self.settings.database_url)
        try:
            jobs.hand_over_waiting()
        finally:
            jobs.close()
        self._write(state.model_copy(update={"canary": None}))

    def down(self) -> None:
        """Stop all; running videos may finish."""
        state = self.state
        for process in (state.router, state.prometheus, state.canary and state.canary.keeper):
            if process is not None:
                process.stop(self.settings.drain_s)
        state.stable.keeper.stop(self.settings.drain_s)
        (self.folder / STATE).unlink()

    def _start(self, track: Track, engine: str, number: int) -> Server:
        name, port = f"{track}-{number}", free_port()
        state = self.folder / f"{name}.json"
        state.unlink(missing_ok=True)
        keeper = [sys.executable, "-m", "infra.rollout.keeper", str(state), *self.settings.command(engine, port)]
        process = self._spawn(keeper, name, STIV_TRACK=track, STIV_DATABASE_URL=self.settings.database_url)
        return Server(track=track, engine=engine, port=port, keeper=process, state=state.name)

    def _spawn(self, command: Sequence[str], name: str, **environment: str) -> Process:
        return Process.spawn(command, self.folder / f"{name}.log", {**self.settings.environment, **environment})

    def _await_ready(self, server: Server) -> None:
        deadline = time.monotonic() + READY_S
        log = self.folder / f"{server.state.removesuffix('.json')}.log"
        while not _is_ready(server.url):
            if self._keeper(server).restarts or time.monotonic() > deadline:
                raise RuntimeError(f"a server of engine {server.engine[:16]} does not become ready: {_end_of(log)}")
            time.sleep(0.1)

    def _keeper(self, server: Server) -> KeeperState:
        path = self.folder / server.state
        if not path.exists():
            return KeeperState(keeper=server.keeper.pid, pid=None, restarts=0)
        return KeeperState.model_validate_json(path.read_bytes())

    def _write(self, state: HomeState) -> None:
        draft = self.folder / f".{STATE}.{os.getpid()}"
        draft.write_text(state.model_dump_json(indent=2))
        os.replace(draft, self.folder / STATE)
        servers = [server for server in (state.stable, state.canary) if server is not None]
        targets = {f"127.0.0.1:{server.port}": {"track": server.track} for server in servers}
        targets[f"127.0.0.1:{state.router_port}"] = {"__metrics_path__": "/router/metrics", "component": "router"}
        write_targets(self.folder / "prometheus", targets)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _end_of(log: Path) -> str:
    return log.read_text()[-500:] if log.exists() else "it wrote no log"
