"""How many replicas a traffic needs: the past of a job table, or any other, played through the simulator.

It owns the figures of such a forecast; it knows nothing of databases. What it leaves out: text encoding, which runs
beside the engine, failures, and what a busy machine adds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

from infra.serving.scheduling.cost import CostModel, Prices
from infra.serving.scheduling.order import Policy, candidate
from infra.serving.scheduling.scheduler import Scheduler
from infra.serving.scheduling.simulator import Arrival, SimulatedRow, Traffic, VirtualClock, simulate


@dataclass(frozen=True, slots=True)
class Forecast:
    """What clients of a traffic would see."""

    videos: int
    seconds: float
    """From the first request to the last video."""
    p50_s: float
    p95_s: float
    p99_s: float
    """From request to video."""
    in_time: float
    """Share of the videos that are done by their deadline, or within `Policy.target_stretch` times what they take
    alone."""
    busy: float
    """Share of the time in which an engine works."""

    @property
    def videos_a_minute(self) -> float:
        return 60 * self.videos / self.seconds


def forecast(
    arrivals: Sequence[Arrival], prices: Prices, *, replicas: int, max_rows: int, policy: Policy | None = None
) -> Forecast:
    """By that many replicas with calls of `max_rows` engine rows that cost what `prices` say."""
    if not arrivals:
        raise ValueError("there is no request to forecast from; give a longer time")
    policy, clock = policy or Policy(), VirtualClock(min(one.created_at for one in arrivals))
    schedulers = [Scheduler[SimulatedRow](max_rows, CostModel(prices), clock, policy=policy) for _ in range(replicas)]
    traffic = simulate(schedulers, arrivals, prices.seconds, clock)
    targets = {one.job_id: candidate(one, prices, policy).target_at for one in arrivals}
    return judge(arrivals, traffic, prices, targets, replicas=replicas)


def judge(
    arrivals: Sequence[Arrival], traffic: Traffic, prices: Prices, targets: Mapping[str, float], *, replicas: int = 1
) -> Forecast:
    """What a played traffic means for its clients; `targets` are when videos should be done."""
    made = [one for one in arrivals if one.job_id in traffic.done_at]
    had_at = {one.job_id: traffic.done_at[one.job_id] + prices.delivery_seconds(one.cost_key) for one in made}
    waits = [had_at[one.job_id] - one.created_at for one in made]
    p50, p95, p99 = (percentile(waits, percent) for percent in (50, 95, 99))
    seconds = max(had_at.values()) - min(one.created_at for one in arrivals)
    in_time = sum(at <= targets[job_id] for job_id, at in had_at.items()) / len(made)
    return Forecast(len(made), seconds, p50, p95, p99, in_time, traffic.busy_s / (replicas * seconds))


def percentile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def faster(arrivals: Sequence[Arrival], load: float) -> list[Arrival]:
    """The same requests `load` times as fast; deadlines stay as far away."""
    first = min(one.created_at for one in arrivals)

    def moved(one: Arrival) -> Arrival:
        created_at = first + (one.created_at - first) / load
        deadline_at = None if one.deadline_at is None else one.deadline_at - one.created_at + created_at
        return replace(one, created_at=created_at, deadline_at=deadline_at)

    return [moved(one) for one in arrivals]
