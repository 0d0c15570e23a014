"""A server's traffic played through the scheduler on a virtual clock: hours in seconds.

It owns the clock and the turns of a worker that needs no time of its own; the scheduler is the very object that serves,
and what a call costs is passed in. It knows nothing of engines, databases or threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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
    cancelled: list[str] = field(default_factory=list[str])
    calls: list[Call] = field(default_factory=list[Call])

    @property
    def busy_s(self) -> float:
        return sum(call.seconds for call in self.calls)


def simulate(
    scheduler: Serves, arrivals: Sequence[Arrival], seconds: Callable[[str, int], float], clock: VirtualClock
) -> Traffic:
    """Serve all arrivals; `seconds` is what a call of (cost_key, engine rows) takes, `clock` also the scheduler's."""
    coming = sorted(arrivals, key=lambda one: one.created_at)[::-1]
    waiting: dict[str, Arrival] = {}
    resident: dict[str, SimulatedRow] = {}
    traffic = Traffic()
    while coming or waiting or resident:
        while coming and coming[-1].created_at <= clock.now:
            one = coming.pop()
            waiting[one.job_id] = one
        _cancel(scheduler, waiting, resident, traffic, clock.now)
        for job_id in scheduler.choose(list(waiting.values()), len(waiting)):
            one = waiting.pop(job_id)
            resident[job_id] = SimulatedRow.of(one)
            scheduler.admit(resident[job_id])
        batch = scheduler.next_batch()
        if batch:
            _call(scheduler, batch, seconds, clock, traffic)
            for row in batch:
                if row.steps_left == 0:
                    scheduler.leave(row.job_id)
                    del resident[row.job_id]
                    traffic.done_at[row.job_id] = clock.now
        elif coming:
            clock.now = coming[-1].created_at
        elif waiting or resident:
            raise AssertionError(
                f"the scheduler is idle while {len(waiting)} jobs wait and {len(resident)} are resident"
            )
    return traffic


def _call(
    scheduler: Serves,
    batch: Sequence[SimulatedRow],
    seconds: Callable[[str, int], float],
    clock: VirtualClock,
    traffic: Traffic,
) -> None:
    took = seconds(batch[0].cost_key, sum(row.rows for row in batch))
    traffic.calls.append(Call(clock.now, took, tuple(row.job_id for row in batch)))
    clock.now += took
    scheduler.observe(batch, took)
    for row in batch:
        row.steps_left -= 1


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
