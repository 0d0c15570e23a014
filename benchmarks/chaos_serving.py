"""What a storm of kill -9 on two replicas of the server under load costs: it should cost no acknowledged job.

It owns the number of kills and the figures; the storm is the test's (`tests.chaos.serving`), on a real PostgreSQL.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.result import report
from tests.chaos.serving import storm
from tests.postgres_server import running_postgres

KILLS, QUICK_KILLS = 200, 10


def main(quick: Annotated[bool, typer.Option("--quick", help="few kills, nothing written")] = False) -> None:
    kills, began = QUICK_KILLS if quick else KILLS, time.monotonic()
    with tempfile.TemporaryDirectory() as name, running_postgres() as server:
        outcome = storm(Path(name), server.new_database(), kills=kills, seed=1)
    figures = {
        "kills": outcome.kills,
        "acknowledged_jobs": len(outcome.acknowledged),
        "acknowledged_jobs_lost": len(outcome.lost),
        "jobs_doubled": len(outcome.doubled),
        "jobs_resumed_from_latents": outcome.resumed,
        "unlike_videos_of_one_request": sum(len(videos) - 1 for videos in outcome.contents.values()),
        "seconds": time.monotonic() - began,
    }
    report("chaos_serving", figures, quick=quick, peers=["sqlalchemy", "psycopg"])


if __name__ == "__main__":
    typer.run(main)
