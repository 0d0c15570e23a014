"""A local home of servers that serve engines of a registry by `stiv serve`: how they are started, and on what.

It owns the command line and the places; it knows nothing of releases.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.rollout.home import Home, HomeSettings


def open_home(
    folder: Path,
    store: str,
    environment: Mapping[str, str],
    *,
    prometheus: str | None = None,
    port: int = 0,
    scrape_every_s: float = 5.0,
) -> Home:
    """The home in `folder`, whose servers fetch from `store`; trust and keys are the environment's."""
    folder, work = folder.absolute(), folder.absolute() / "serving"
    where = ["--store", str(Path(store).absolute()) if "://" not in store else store, "--work", str(work)]
    keys = [key.strip() for key in environment.get("STIV_API_KEYS", "").split(",") if key.strip()]
    python_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]))
    return Home(
        folder,
        HomeSettings(
            command=lambda engine, at: [sys.executable, "-m", "flows.cli", "serve", engine, "--port", str(at), *where],
            environment={**environment, "PYTHONPATH": python_path},
            database_url=environment.get("STIV_DATABASE_URL", f"sqlite:///{work}/jobs.db"),
            router_port=port,
            prometheus_url=prometheus,
            scrape_every_s=scrape_every_s,
            key=keys[0] if keys else None,
        ),
    )
