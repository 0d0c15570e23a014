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
from itertools import chain
from typing import Generic, Protocol, TypeVar

from infra.serving.scheduling.cost import LEAST_S, CostModel, volume
from infra.serving.scheduling.fairness import FairShare
from infra.serving.scheduling.order import Candidate, Policy, Video, candidate
from infra.serving.scheduling.outlook import Outlook
from infra.serving.scheduling.ranking import Line, in_order, rankings

Clock = Callable[[], float]
RESIDENT_A_ROW = 2
"""Videos held for each engine row of a call, unless said: enough to pause whole calls for urgent ones."""


class Seated(Video, Protocol):
    """A resident video."""

    @property
    def key(self) -> object:
        """Equal keys can share an engine call; it does not change while the row is resident."""
        ...


Row = TypeVar("Row", bound=Seated)


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
    standing: Candidate
    """Brought up to date before every decision."""


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
        self._line = Line()
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

    def choose(self, waiting: Sequence[Video], limit: int) -> list[str]:
        """At most `limit` jobs to lease now: those the call after the next would hold if all that wait were resident.

        They count as resident until `admit` or `leave`. Jobs that would be paused at once are left to other replicas.
        """
        if self._coming:
            for job in waiting:
                self._coming.pop(job.job_id, None)
        now = self._clock()
        self._line.update(waiting, self._priced, now)
        held = {one.job_id: one for one in self._resident() if one.steps_left > 1} | self._coming
        groups = rankings(held.values(), now), self._line.rankings
        lead = self._shares.lead(client for group in groups for client in group)
        self._queued_late = self._line.first_late(lead, self._quantum_s)
        leader = self._late_leader(lambda job_id: held.get(job_id) or self._line.find(job_id))
        chosen: list[str] = []
        for one in self._plan(in_order(groups, lead, self._quantum_s), leader, now):
            if one.job_id not in held and len(chosen) < limit and self._has_room(one):
                self._line.take(one.job_id)
                self._coming[one.job_id] = one
                chosen.append(one.job_id)
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
        self._line.take(row.job_id)
        standing = replace(chosen or self._priced(row), key=row.key)
        self._seats[row.job_id] = _Seat(row, standing)
        self._typical_s += (standing.alone_s - self._typical_s) * (0.1 if self._typical_s else 1.0)

    def leave(self, job_id: str) -> None:
        """Free the place of a row that is finished, failed or cancelled, or of a job that was chosen in vain."""
        self._seats.pop(job_id, None)
        self._coming.pop(job_id, None)

    def next_batch(self) -> list[Row]:
        """Rows of the next engine call, most urgent first; empty when nothing is resident."""
        if not self._seats:
            return []
        now = self._clock()
        held = {one.job_id: one for one in self._resident()}
        group = rankings(held.values(), now)
        ordered = list(in_order([group], self._shares.lead(group), self._quantum_s))
        late = next((one for one in ordered if one.is_late(now)), None)
        self._late = _older(late, self._queued_late)
        return [self._seats[one.job_id].row for one in self._plan(ordered, self._late_leader(held.get), now)]

    def observe(self, batch: Sequence[Row], seconds: float) -> None:
        """The call for `batch` took so long: the cost is learnt, its clients are charged."""
        rows = sum(row.rows for row in batch)
        self.cost.observe(batch[0].cost_key, rows, seconds)
        for row in batch:
            self._shares.charge(row.client, seconds * (row.rows / rows if rows else 1 / len(batch)))
        if self._late is None:
            self._late_credit_s = 0.0
        elif any(row.job_id == self._late.job_id for row in batch):
            self._late_credit_s = min(0.0, self._late_credit_s - (1 - self.policy.late_share) * seconds)
        else:
            self._late_credit_s += self.policy.late_share * seconds

    def outlook(self) -> Outlook:
        """What this replica holds and how fast it is, for estimates in any process."""
        held = [replace(one) for one in (*self._resident(), *self._coming.values())]
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

    def _priced(self, video: Video) -> Candidate:
        return candidate(video, self.cost.prices, self.policy)

    def _has_room(self, one: Candidate) -> bool:
        if self.free_rows == 0:
            return False
        held = [*(seat.standing for seat in self._seats.values()), *self._coming.values()]
        return sum(volume(each.cost_key) for each in (*held, one)) <= self.memory.resident_volume or not held

    def _resident(self) -> list[Candidate]:
        """As they stand now."""
        step_s: dict[tuple[str, int], float] = {}
        for seat in self._seats.values():
            one, row = seat.standing, seat.row
            one.steps_left, one.rows = row.steps_left, row.rows
            price = one.cost_key, one.rows or 1
            if price not in step_s:
                step_s[price] = self.cost.seconds(*price)
            one.alone_s = one.steps_left * step_s[price] + one.delivery_s
        return [seat.standing for seat in self._seats.values()]

    def _late_leader(self, find: Callable[[str], Candidate | None]) -> Candidate | None:
        """The oldest late one, when it is its turn to lead."""
        return find(self._late.job_id) if self._late is not None and self._late_credit_s > 0 else None

    def _plan(self, ordered: Iterable[Candidate], leader: Candidate | None, now: float) -> list[Candidate]:
        """The call's videos: the leader, the first unless said, and those that ride along."""
        batch: list[Candidate] = []
        rows, limit, longest_s, measured = 0, 0, float("inf"), False
        for one in ordered if leader is None else chain((leader,), ordered):
            if not batch:
                leader, limit, measured = one, self.rows_of(one.cost_key), one.cost_key in self.cost.prices.buckets
            elif rows >= limit and one.key is None:
                break  # a resident may need no row of its next call; a queued job needs one
            elif one is leader or rows + one.rows > limit or leader is None or not one.may_ride_with(leader):
                continue  # the leader is taken even if no call holds it: `admit` refuses it, and it holds up nobody
            call_s, may_take_s = self.cost.seconds(one.cost_key, rows + one.rows), one.longest_call_s(now)
            if measured and call_s > longest_s:
                break
            if may_take_s >= call_s:  # else it is late already, or would be: no reason to leave others out
                longest_s = min(longest_s, may_take_s)
            batch.append(one)
            rows += one.rows
        return batch


def _older(one: Candidate | None, other: Candidate | None) -> Candidate | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda each: each.late_rank)
