"""A server's traffic played through the scheduler on a virtual clock: hours in seconds.

It owns the clock and the turns of workers that need no time of their own; the scheduler is the very object that serves,
and what a call costs is passed in. It knows nothing of engines, databases or threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Protocol, Self

from infra.serving.scheduling.order import QueuedJob, Video


@dataclass(slots=True)
class Arrival(QueuedJob):
    """A job that will be asked for at `created_at`."""

    cancelled_at: float | None = None


class SimulatedRow(Arrival):
    """An arrival that is being denoised."""

    @property
    def key(self) -> str:
        return self.cost_key

    @classmethod
    def of(cls, arrival: Arrival) -> Self:
        return cls(**asdict(arrival))


class Serves(Protocol):
    """What a worker asks of a scheduler; `Scheduler` is one."""

    def choose(self, waiting: Sequence[Video], limit: int) -> list[str]: ...
    def admit(self, row: SimulatedRow) -> None: ...
    def leave(self, job_id: str) -> None: ...
    def next_batch(self) -> list[SimulatedRow]: ...
    def observe(self, batch: Sequence[SimulatedRow], seconds: float) -> None: ...


@dataclass(slots=True)
class VirtualClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Call:
    began_at: float
    seconds: float
    job_ids: tuple[str, ...]


@dataclass(slots=True)
class Traffic:
    """What became of the arrivals."""

    done_at: dict[str, float] = field(default_factory=dict[str, float])
    """When the last step of each was done."""
    cancelled: list[str] = field(default_factory=list[str])
    calls: list[Call] = field(default_factory=list[Call])

    @property
    def busy_s(self) -> float:
        return sum(call.seconds for call in self.calls)


@dataclass(slots=True)
class _Replica:
    scheduler: Serves
    free_at: float = 0.0
    """When its call is over; infinity while it has nothing to do."""
    resident: dict[str, SimulatedRow] = field(default_factory=dict[str, SimulatedRow])


def simulate(
    schedulers: Sequence[Serves], arrivals: Sequence[Arrival], seconds: Callable[[str, int], float], clock: VirtualClock
) -> Traffic:
    """Serve all arrivals by one replica a scheduler; `seconds` is what a call of (cost_key, engine rows) takes.

    `clock` is also the schedulers'.
    """
    coming = sorted(arrivals, key=lambda one: one.created_at)[::-1]
    waiting: dict[str, Arrival] = {}
    replicas = [_Replica(scheduler, clock.now) for scheduler in schedulers]
    traffic = Traffic()
    while True:
        replica = min(replicas, key=lambda one: one.free_at)
        if coming and coming[-1].created_at < replica.free_at and any(one.free_at == inf for one in replicas):
            clock.now = max(clock.now, coming[-1].created_at)
            for one in replicas:
                one.free_at = min(one.free_at, clock.now) if one.free_at == inf else one.free_at
            continue
        if replica.free_at == inf:
            break
        clock.now = replica.free_at
        while coming and coming[-1].created_at <= clock.now:
            one = coming.pop()
            waiting[one.job_id] = one
        _turn(replica, waiting, seconds, clock.now, traffic)
    if waiting or any(one.resident for one in replicas):
        raise AssertionError(f"the schedulers are idle while {len(waiting)} jobs wait")
    return traffic


def _turn(
    replica: _Replica,
    waiting: dict[str, Arrival],
    seconds: Callable[[str, int], float],
    now: float,
    traffic: Traffic,
) -> None:
    """Take in what the scheduler wants, and make its next call."""
    scheduler, resident = replica.scheduler, replica.resident
    _cancel(scheduler, waiting, resident, traffic, now)
    for job_id in scheduler.choose(list(waiting.values()), len(waiting)):
        resident[job_id] = SimulatedRow.of(waiting.pop(job_id))
        scheduler.admit(resident[job_id])
    batch = scheduler.next_batch()
    if not batch:
        replica.free_at = inf
        return
    took = seconds(batch[0].cost_key, sum(row.rows for row in batch))
    traffic.calls.append(Call(now, took, tuple(row.job_id for row in batch)))
    replica.free_at = now + took
    scheduler.observe(batch, took)
    for row in batch:
        row.steps_left -= 1
        if row.steps_left == 0:
            scheduler.leave(row.job_id)
            del resident[row.job_id]
            traffic.done_at[row.job_id] = replica.free_at


def _cancel(
    scheduler: Serves,
    waiting: dict[str, Arrival],
    resident: dict[str, SimulatedRow],
    traffic: Traffic,
    now: float,
) -> None:
    for one in (*waiting.values(), *resident.values()):
        if one.cancelled_at is not None and one.cancelled_at <= now:
            waiting.pop(one.job_id, None)
            if resident.pop(one.job_id, None) is not None:
                scheduler.leave(one.job_id)
            traffic.cancelled.append(one.job_id)
