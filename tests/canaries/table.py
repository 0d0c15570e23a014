"""One row of the table: a canary of one kind beside a stable server under live load, and how it ended.

It owns the row and its figures; kinds are `server`'s, users are `load`'s.
"""

from dataclasses import dataclass
from pathlib import Path

from infra.rollout.analysis import AnalysisLimits
from infra.rollout.canary import Canary, CanaryPlan, Outcome
from infra.rollout.home import Home
from infra.rollout.probe import ProbeSettings
from infra.rollout.prometheus import Prometheus
from tests.canaries.load import users
from tests.canaries.server import ENDS, home_settings

USERS = 4


@dataclass(frozen=True)
class Row:
    kind: str
    outcome: Outcome
    made: int
    failures: list[str]

    @property
    def is_right(self) -> bool:
        return self.outcome.decision == ENDS[self.kind]


def plan(*, deadline_s: float, min_samples: int = 12) -> CanaryPlan:
    """Everything a canary meets, in seconds instead of hours."""
    return CanaryPlan(
        weights=(50,),
        look_every_s=1.5,
        deadline_s=deadline_s,
        limits=AnalysisLimits(min_samples=min_samples, false_abort_rate=0.05, max_silent_looks=4),
        probe=ProbeSettings(prompts=("a red circle moves right",), num_inference_steps=4, timeout_s=120),
    )


def play(home: Home, kind: str, plan: CanaryPlan) -> Row:
    """A canary of that kind in a home that is up; promoted if it is fit, and gone afterwards."""
    prometheus = Prometheus(home.state.prometheus_url)
    try:
        with users(home.url, 0 if kind == "no-traffic" else USERS) as seen:
            outcome = Canary(home, prometheus, plan).run(kind, same_weights=True)
            if outcome.decision == "promote":
                home.promote()
    finally:
        prometheus.close()
    return Row(kind, outcome, seen.made, seen.failures)


def new_home(folder: Path) -> Home:
    """A home with a good stable server."""
    home = Home(folder, home_settings(folder))
    home.up("good")
    return home
