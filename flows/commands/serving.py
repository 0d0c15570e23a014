"""`stiv capacity`: what more or fewer replicas would make of the traffic that a job database remembers."""

import time
from typing import Annotated

import typer
from rich.table import Table

from flows.commands.tables import console

app = typer.Typer()

DatabaseArgument = Annotated[
    str,
    typer.Argument(
        help="SQLAlchemy URL; STIV_DATABASE_URL keeps a password off the list of processes", envvar="STIV_DATABASE_URL"
    ),
]


@app.command()
def capacity(
    database: DatabaseArgument = "sqlite:///runs/serving/jobs.db",
    hours: Annotated[float, typer.Option(min=0, help="of traffic, back from now")] = 24.0,
    load: Annotated[float, typer.Option(min=0.01, help="how many times as fast the same requests come")] = 1.0,
    replicas: Annotated[int, typer.Option(min=1, max=100, help="at most so many")] = 4,
) -> None:
    """Forecast from past requests, and from what calls cost, how many servers they need (docs/serve.md)."""
    from infra.serving.jobs.store import JobStore
    from infra.serving.scheduling.capacity import faster, forecast
    from infra.serving.scheduling.outlook import Outlook

    jobs = JobStore(database)
    arrivals = jobs.history(since=time.time() - 3600 * hours)
    said = [Outlook.from_json(one) for one in jobs.states(max_age_s=3600 * hours)]
    jobs.close()
    if not arrivals or not said:
        what = "request was made" if not arrivals else "server said what its calls cost"
        raise ValueError(f"no {what} in the last {hours:g} hours: give more --hours, or serve first")
    outlook = Outlook.merge(said)
    table = Table("replicas", "videos a minute", "p50 s", "p95 s", "p99 s", "in time", "engines busy")
    for count in range(1, replicas + 1):
        told = forecast(
            faster(arrivals, load), outlook.prices, replicas=count, max_rows=outlook.max_rows, policy=outlook.policy
        )
        waits = (f"{seconds:.3g}" for seconds in (told.p50_s, told.p95_s, told.p99_s))
        table.add_row(str(count), f"{told.videos_a_minute:.3g}", *waits, f"{told.in_time:.1%}", f"{told.busy:.0%}")
    console.print(table)
