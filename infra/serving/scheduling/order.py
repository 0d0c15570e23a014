"""In which order videos are served: fair shares first, then what can still be in time, by its target, then the rest.

It owns the order and its settings; it knows nothing of calls, memory or who is resident. All of it is a pure function
of the videos, the time and the clients' lead, so a worker, a server that only answers, and the simulator agree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from infra.serving.scheduling.cost import Prices
from model.config import Config


class Waiting(Protocol):
    """A queued job."""

    @property
    def id(self) -> str: ...
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
        """Engine rows of a call: 1 without guidance, 2 with joint, 3 with separate guidance."""
        ...

    @property
    def steps(self) -> int: ...
    @property
    def cost_key(self) -> str:
        """FRAMESxHEIGHTxWIDTH; videos of one bucket can share a call and are priced alike."""
        ...


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A `Waiting` that is no row of a table."""

    id: str
    cost_key: str
    steps: int
    rows: int
    created_at: float
    client: str = ""
    priority: int = 0
    deadline_at: float | None = None


class Policy(Config):
    """How a server weighs its clients' wishes."""

    target_stretch: Annotated[float, Field(ge=1)] = 3.0
    """A video without a deadline should be done within so many times what it takes alone."""
    aging_s: Annotated[float, Field(gt=0)] = 30.0
    """One step of priority is worth so much waiting."""
    late_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of the engine, for videos that can no longer reach their target, however many others can."""
    fair_quantum: Annotated[float, Field(gt=0)] = 1.0
    """How far a client may be ahead of another that waits, in typical videos."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A video as the order sees it."""

    id: str
    key: object
    """Equal keys can share a call."""
    cost_key: str
    client: str
    rows: int
    steps: int
    """Still to do."""
    created_at: float
    worth_s: float
    """Waiting that its priority stands for."""
    target_at: float
    """When it should be done: its deadline, or its own target."""
    alone_s: float
    """What is still to do would take so long alone, delivery included."""

    delivery_s: float
    """The part of it after the last step."""

    @property
    def arrived_at(self) -> float:
        """Its age as it counts among late ones."""
        return self.created_at - self.worth_s

    def is_late(self, now: float) -> bool:
        """Whether it cannot reach its target even if it runs alone from now on."""
        return now + self.alone_s > self.target_at

    def longest_call_s(self, now: float) -> float:
        """How long its calls may take from now on so that it still reaches its target."""
        return (self.target_at - self.delivery_s - now) / max(self.steps, 1)


def candidate(job: Waiting, prices: Prices, policy: Policy) -> Candidate:
    delivery_s = prices.delivery_seconds(job.cost_key)
    alone_s = job.steps * prices.seconds(job.cost_key, job.rows) + delivery_s
    own_target = job.created_at + policy.target_stretch * alone_s
    return Candidate(
        id=job.id,
        key=job.cost_key,
        cost_key=job.cost_key,
        client=job.client,
        rows=job.rows,
        steps=job.steps,
        created_at=job.created_at,
        worth_s=job.priority * policy.aging_s,
        target_at=own_target if job.deadline_at is None else job.deadline_at,
        alone_s=alone_s,
        delivery_s=delivery_s,
    )


def in_order(
    candidates: Iterable[Candidate], now: float, lead: Mapping[str, float], quantum_s: float
) -> list[Candidate]:
    """Most urgent first: videos that can reach their target by target, then the late ones as they arrived.

    With several clients the videos of each fall into rounds, `quantum_s` engine seconds long and begun by its `lead`;
    an earlier round goes first.
    """
    ranked = sorted(candidates, key=lambda one: _urgency(one, now))
    if len(lead) < 2:
        return ranked
    had, rounds = dict(lead), dict[str, int]()
    for one in ranked:
        rounds[one.id] = int(had[one.client] / quantum_s)
        had[one.client] += one.alone_s
    return sorted(ranked, key=lambda one: rounds[one.id])


def _urgency(one: Candidate, now: float) -> tuple[bool, float, float, str]:
    late = one.is_late(now)
    return late, one.arrived_at if late else one.target_at - one.worth_s, one.arrived_at, one.id
