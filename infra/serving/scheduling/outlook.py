"""When videos will be done: a snapshot of a worker from which any process can tell.

It owns the estimate; it knows nothing of rows, databases or HTTP. The worker publishes it as JSON, the API reads it, so
every replica answers alike. An estimate counts what is known now: what arrives later with a nearer target comes on top.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from infra.serving.scheduling.cost import LEAST_S, Prices
from infra.serving.scheduling.order import Candidate, Policy, Video, candidate
from infra.serving.scheduling.ranking import in_order, rankings


@dataclass(frozen=True, slots=True)
class Estimate:
    done_at: float
    alone_s: float
    """What the video takes on an engine that does nothing else."""


@dataclass(slots=True)
class _Bucket:
    """The work of one shape so far in the order."""

    rows: int = 0
    row_steps: int = 0
    most_steps: int = 0

    def add(self, one: Candidate) -> None:
        self.rows += one.rows
        self.row_steps += one.rows * one.steps_left
        self.most_steps = max(self.most_steps, one.steps_left)

    def seconds(self, cost_key: str, max_rows: int, prices: Prices) -> float:
        """All of it, in calls as full as they can be; no video takes two steps in one call."""
        rows = min(self.rows, max_rows)
        calls = max(self.most_steps, self.row_steps / rows) if rows else self.most_steps
        call_s, row_s = prices.line(cost_key)
        return calls * call_s + self.row_steps * row_s


@dataclass(frozen=True, slots=True)
class Outlook:
    at: float
    """When it was taken, in the time of `created_at`."""
    max_rows: int
    held: tuple[Candidate, ...]
    """Resident videos as they stood."""
    lead: Mapping[str, float]
    quantum_s: float
    prices: Prices
    policy: Policy
    replicas: int = 1

    def estimates(self, waiting: Iterable[Video]) -> dict[str, float]:
        """When each video held or waiting will be done; more work never makes another earlier."""
        queued = [candidate(job, self.prices, self.policy) for job in waiting]
        group = rankings((*self.held, *queued), self.at)
        lead = {client: self.lead.get(client, 0.0) for client in group}
        ordered = list(in_order([group], lead, self.quantum_s))
        buckets: dict[str, _Bucket] = {}
        seconds: dict[str, float] = {}
        done: dict[str, float] = {}
        for one in ordered:
            bucket = buckets.setdefault(one.cost_key, _Bucket())
            bucket.add(one)
            seconds[one.cost_key] = bucket.seconds(one.cost_key, self.max_rows, self.prices)
            own_s = one.steps_left * self.prices.seconds(one.cost_key, one.rows)
            done[one.job_id] = max(sum(seconds.values()) / self.replicas, own_s)
        total_s = sum(seconds.values()) / self.replicas
        slowed = 1 - self.policy.late_share if any(one.is_late(self.at) for one in ordered) else 1.0
        return {
            one.job_id: self.at + one.delivery_s + max(done[one.job_id], min(done[one.job_id] / slowed, total_s))
            for one in ordered
        }

    def estimate(self, waiting: Iterable[Video], job: Video) -> Estimate:
        """Of a job that would be created now."""
        others = [one for one in waiting if one.job_id != job.job_id]
        alone_s = candidate(job, self.prices, self.policy).alone_s
        done_at = self.estimates([*others, job])[job.job_id]
        return Estimate(max(done_at, job.created_at + alone_s), alone_s)

    def retry_after(self, waiting: Iterable[Video], places: int = 1) -> float:
        """Seconds until so many places of a full queue are free: as many videos are done by then."""
        done = sorted(self.estimates(waiting).values())
        return max(done[min(places, len(done)) - 1] - self.at, LEAST_S) if done else LEAST_S

    @classmethod
    def merge(cls, outlooks: Sequence[Self]) -> Self:
        """Of all replicas that share a queue; the one taken last says what calls cost."""
        if not outlooks:
            return cls(time.time(), 1, (), {}, LEAST_S, Prices(), Policy())
        latest = max(outlooks, key=lambda one: one.at)
        lead: dict[str, float] = {}
        for one in outlooks:
            for client, seconds in one.lead.items():
                lead[client] = lead.get(client, 0.0) + seconds
        return replace(
            latest, held=tuple(each for one in outlooks for each in one.held), lead=lead, replicas=len(outlooks)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "at": self.at,
            "max_rows": self.max_rows,
            "held": [one.to_json() for one in self.held],
            "lead": dict(self.lead),
            "quantum_s": self.quantum_s,
            "prices": self.prices.to_json(),
            "policy": self.policy.model_dump(),
            "replicas": self.replicas,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            at=value["at"],
            max_rows=value["max_rows"],
            held=tuple(Candidate(**one) for one in value["held"]),
            lead=value["lead"],
            quantum_s=value["quantum_s"],
            prices=Prices.from_json(value["prices"]),
            policy=Policy.model_validate(value["policy"]),
            replicas=value["replicas"],
        )
