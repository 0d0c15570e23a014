"""How canaries of every kind end beside a stable server under live load, and what a roll back costs users.

It owns the kinds and the figures; kinds, users and servers are the test's (`tests.canaries`), on a real Prometheus.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.result import report
from tests.canaries.server import KINDS
from tests.canaries.table import Row, new_home, plan, play

QUICK_KINDS = ("wrong-output", "crashing")
SILENT = ("no-traffic", "metrics-down")
"""Of these nothing can be said; they end at the deadline."""
DEADLINE_S, SILENT_S = 240.0, 20.0


def main(quick: Annotated[bool, typer.Option("--quick", help="two kinds, nothing written")] = False) -> None:
    kinds = QUICK_KINDS if quick else KINDS
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        home = new_home(Path(name))
        try:
            for kind in kinds:
                rows.append(play(home, kind, plan(deadline_s=SILENT_S if kind in SILENT else DEADLINE_S)))
                print(f"{kind}: {rows[-1].outcome.decision}, {rows[-1].outcome.reason}", flush=True)
        finally:
            home.down()
    back = [row.outcome.seconds_to_roll_back for row in rows if row.outcome.seconds_to_roll_back is not None]
    figures = {
        "kinds": len(rows),
        "wrong_decisions": sum(not row.is_right for row in rows),
        "user_requests": sum(row.made for row in rows),
        "failed_user_requests": sum(len(row.failures) for row in rows),
        "seconds_to_roll_back": max(back),
    }
    report("canary", figures, quick=quick)


if __name__ == "__main__":
    typer.run(main)
