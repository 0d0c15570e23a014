"""Which videos share the next engine call, and which queued jobs become resident for it.

It owns the resident rows, the limits of memory and the account of who had the engine; it knows nothing of tensors,
threads or databases. Plain Python: the worker and the simulator drive the same object.

The first video in the order (`order`) leads the call. Others of its bucket ride along in the same order while there
are engine rows left and while none before them loses its target by it. Rows that are left out are paused: they stay
resident and go on when they are chosen again. The oldest late video leads often enough to get `Policy.late_share` of
the engine, so it is done after at most (its steps x the longest call) / late_share engine seconds from when it became
the oldest, whatever else arrives.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from infra.serving.scheduling.cost import LEAST_S, CostModel, volume
from infra.serving.scheduling.fairness import FairShare
from infra.serving.scheduling.order import Candidate, Policy, QueuedJob, Waiting, candidate, in_order
from infra.serving.scheduling.outlook import Outlook

Clock = Callable[[], float]
RESIDENT_A_ROW = 2
"""Videos held for each engine row of a call, unless said: enough to pause whole calls for urgent ones."""


class Schedulable(Protocol):
    """A resident video."""

    @property
    def job_id(self) -> str: ...
    @property
    def key(self) -> object:
        """Equal keys can share an engine call."""
        ...

    @property
    def cost_key(self) -> str: ...
    @property
    def client(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def deadline_at(self) -> float | None: ...
    @property
    def created_at(self) -> float: ...
    @property
    def rows(self) -> int:
        """Engine rows of its next call; 0 if it needs none for this step."""
        ...

    @property
    def steps_left(self) -> int: ...


Row = TypeVar("Row", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bounds beside the number of rows and videos, in pixels of clips (frames x height x width)."""

    call_volume: float = float("inf")
    """Engine rows of a call x pixels of one: bounds activations."""
    resident_volume: float = float("inf")
    """Pixels of all videos held: bounds latents, noise and embeddings."""


UNBOUNDED = Memory()
DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class _Seat(Generic[Row]):
    row: Row
    admitted: Candidate


class Scheduler(Generic[Row]):
    def __init__(
        self,
        max_rows: int,
        cost: CostModel,
        clock: Clock = time.time,
        *,
        max_resident: int | None = None,
        memory: Memory = UNBOUNDED,
        policy: Policy = DEFAULT_POLICY,
    ) -> None:
        """At most `max_rows` engine rows a call, at most `max_resident` videos; `clock` is that of `created_at`."""
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} must be at least 1")
        self.max_rows = max_rows
        self.max_resident = RESIDENT_A_ROW * max_rows if max_resident is None else max_resident
        if self.max_resident < 1:
            raise ValueError(f"max_resident {self.max_resident} must be at least 1")
        self.memory = memory
        self.policy = policy
        self.cost = cost
        self._clock = clock
        self._seats: dict[str, _Seat[Row]] = {}
        self._coming: dict[str, Candidate] = {}
        self._queued: dict[str, Candidate] = {}
        self._shares = FairShare()
        self._typical_s = 0.0
        self._late: Candidate | None = None
        """The oldest late one, resident or queued."""
        self._queued_late: Candidate | None = None
        self._late_credit_s = 0.0
        """Engine seconds that it should have had and did not."""

    @property
    def rows(self) -> list[Row]:
        """All resident rows, as they were admitted."""
        return [seat.row for seat in self._seats.values()]

    @property
    def free_rows(self) -> int:
        """How many more jobs may be leased now."""
        return max(0, self.max_resident - len(self._seats) - len(self._coming))

    def rows_of(self, cost_key: str) -> int:
        """Engine rows a call of this bucket may have."""
        return int(min(self.max_rows, self.memory.call_volume // volume(cost_key)))

    def choose(self, waiting: Sequence[Waiting], limit: int) -> list[str]:
        """At most `limit` jobs to lease now: those the call after the next would hold if all that wait were resident.

        They count as resident until `admit` or `leave`. Jobs that would be paused at once are left to other replicas.
        """
        for job in waiting:
            self._coming.pop(job.id, None)
        now = self._clock()
        self._queued = {job.id: self._queued.get(job.id) or self._priced(job) for job in waiting}
        staying = [one for one in self._resident() if one.steps > 1]
        ordered = self._ordered([*staying, *self._coming.values(), *self._queued.values()], now)
        self._queued_late = _first_late((one for one in ordered if one.id in self._queued), now)
        chosen: list[str] = []
        for one in self._plan(ordered, now):
            if one.id in self._queued and len(chosen) < limit and self._has_room(one):
                self._coming[one.id] = self._queued.pop(one.id)
                chosen.append(one.id)
        return chosen

    def admit(self, row: Row) -> None:
        """The row takes part in the choice of the next call."""
        if row.job_id in self._seats:
            raise ValueError(f"job {row.job_id} is resident already")
        chosen = self._coming.pop(row.job_id, None)
        if chosen is None and self.free_rows == 0:
            raise ValueError(f"all {self.max_resident} places are taken; admit no more than free_rows")
        if row.rows > self.rows_of(row.cost_key):
            raise ValueError(
                f"job {row.job_id} takes {row.rows} engine rows of bucket {row.cost_key}, a call holds"
                f" {self.rows_of(row.cost_key)}; refuse such requests"
            )
        self._queued.pop(row.job_id, None)
        admitted = replace(chosen or self._priced(_as_queued(row)), key=row.key)
        self._seats[row.job_id] = _Seat(row, admitted)
        self._typical_s += (admitted.alone_s - self._typical_s) * (0.1 if self._typical_s else 1.0)

    def leave(self, job_id: str) -> None:
        """Free the place of a row that is finished, failed or cancelled, or of a job that was chosen in vain."""
        self._seats.pop(job_id, None)
        self._coming.pop(job_id, None)

    def next_batch(self) -> list[Row]:
        """Rows of the next engine call, most urgent first; empty when nothing is resident."""
        if not self._seats:
            return []
        now = self._clock()
        ordered = self._ordered(self._resident(), now)
        self._late = _older(_first_late(ordered, now), self._queued_late)
        return [self._seats[one.id].row for one in self._plan(ordered, now)]

    def observe(self, batch: Sequence[Row], seconds: float) -> None:
        """The call for `batch` took so long: the cost is learnt, its clients are charged."""
        rows = sum(row.rows for row in batch)
        self.cost.observe(batch[0].cost_key, rows, seconds)
        for row in batch:
            self._shares.charge(row.client, seconds * (row.rows / rows if rows else 1 / len(batch)))
        if self._late is None:
            self._late_credit_s = 0.0
        elif any(row.job_id == self._late.id for row in batch):
            self._late_credit_s = min(0.0, self._late_credit_s - (1 - self.policy.late_share) * seconds)
        else:
            self._late_credit_s += self.policy.late_share * seconds

    def outlook(self) -> Outlook:
        """What this replica holds and how fast it is, for estimates in any process."""
        held = [*self._resident(), *self._coming.values()]
        return Outlook(
            at=self._clock(),
            max_rows=self.max_rows,
            held=tuple(held),
            lead=self._shares.lead(one.client for one in held),
            quantum_s=self._quantum_s,
            prices=self.cost.prices,
            policy=self.policy,
        )

    @property
    def _quantum_s(self) -> float:
        return max(self.policy.fair_quantum * self._typical_s, LEAST_S)

    def _priced(self, job: Waiting) -> Candidate:
        return candidate(job, self.cost.prices, self.policy)

    def _has_room(self, one: Candidate) -> bool:
        if self.free_rows == 0:
            return False
        held = [*(seat.admitted for seat in self._seats.values()), *self._coming.values()]
        return sum(volume(each.cost_key) for each in (*held, one)) <= self.memory.resident_volume or not held

    def _resident(self) -> list[Candidate]:
        """As they stand now."""
        found: list[Candidate] = []
        for seat in self._seats.values():
            known, steps = seat.admitted, seat.row.steps_left
            alone_s = steps * self.cost.seconds(known.cost_key, known.rows) + known.delivery_s
            found.append(replace(known, rows=seat.row.rows, steps=steps, alone_s=alone_s))
        return found

    def _ordered(self, candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        return in_order(candidates, now, self._shares.lead(one.client for one in candidates), self._quantum_s)

    def _plan(self, ordered: Sequence[Candidate], now: float) -> list[Candidate]:
        """The call's videos: the leader, and those that ride along."""
        if not ordered:
            return []
        leader = ordered[0]
        if self._late is not None and self._late_credit_s > 0:
            leader = next((one for one in ordered if one.id == self._late.id), leader)
        batch: list[Candidate] = []
        rows, limit, longest_s = 0, self.rows_of(leader.cost_key), float("inf")
        measured = leader.cost_key in self.cost.prices.buckets
        for one in (leader, *ordered):
            if batch and (one is leader or one.key != leader.key or rows + one.rows > limit):
                continue  # the leader is taken even if no call holds it: `admit` refuses it, and it holds up nobody
            call_s, may_take_s = self.cost.seconds(one.cost_key, rows + one.rows), one.longest_call_s(now)
            if measured and call_s > longest_s:
                break
            if may_take_s >= call_s:  # else it is late already, or would be: no reason to leave others out
                longest_s = min(longest_s, may_take_s)
            batch.append(one)
            rows += one.rows
        return batch


def _as_queued(row: Schedulable) -> QueuedJob:
    return QueuedJob(
        id=row.job_id,
        cost_key=row.cost_key,
        steps=row.steps_left,
        rows=row.rows,
        created_at=row.created_at,
        client=row.client,
        priority=row.priority,
        deadline_at=row.deadline_at,
    )


def _first_late(ordered: Iterable[Candidate], now: float) -> Candidate | None:
    return next((one for one in ordered if one.is_late(now)), None)


def _older(one: Candidate | None, other: Candidate | None) -> Candidate | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda each: (each.arrived_at, each.id))
