"""What decides the order of a video: what is known of it, its target, and where it ranks in time or late.

It owns the ranks and the settings behind them; how an order comes of many ranks, and of fair shares, is `ranking`'s.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Protocol

from pydantic import Field

from infra.serving.scheduling.cost import Prices
from model.config import Config

Rank = tuple[float, float, str]


class Video(Protocol):
    """A queued job, or a row that is being denoised."""

    @property
    def job_id(self) -> str: ...
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
        """Engine rows of its next call: 1 without guidance, 2 with joint, 3 with separate; 0 if it needs none."""
        ...

    @property
    def steps_left(self) -> int: ...
    @property
    def cost_key(self) -> str:
        """FRAMESxHEIGHTxWIDTH; videos of one bucket can share a call and are priced alike."""
        ...


@dataclass(slots=True)
class QueuedJob:
    """A `Video` that waits."""

    job_id: str
    cost_key: str
    steps_left: int
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


@dataclass(slots=True)
class Candidate:
    """A video as the order sees it. Where it stands in the order does not change while it waits."""

    job_id: str
    cost_key: str
    client: str
    rows: int
    steps_left: int
    created_at: float
    worth_s: float
    """Waiting that its priority stands for."""
    target_at: float
    """When it should be done: its deadline, or its own target."""
    alone_s: float
    """What is still to do would take so long alone, delivery included."""

    delivery_s: float
    """The part of it after the last step."""
    key: object = None
    """Of a row: equal keys can share a call. None while the job is queued."""
    timely_rank: Rank = field(init=False)
    """Among videos that can be in time: the nearest target first."""
    late_rank: Rank = field(init=False)
    """Among the late: as they arrived, as if those of a higher priority had come earlier."""

    def __post_init__(self) -> None:
        arrived_at = self.created_at - self.worth_s
        self.timely_rank = self.target_at - self.worth_s, arrived_at, self.job_id
        self.late_rank = arrived_at, arrived_at, self.job_id

    def to_json(self) -> dict[str, Any]:
        """Without its key, which means nothing elsewhere."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "key"}

    def is_late(self, now: float) -> bool:
        """Whether it cannot reach its target even if it runs alone from now on."""
        return now + self.alone_s > self.target_at

    def longest_call_s(self, now: float) -> float:
        """How long its calls may take from now on so that it still reaches its target."""
        return (self.target_at - self.delivery_s - now) / max(self.steps_left, 1)

    def may_ride_with(self, leader: "Candidate") -> bool:
        """Whether one call can hold both; a queued job will be a row of the bucket, whichever engine draws it."""
        if self.cost_key != leader.cost_key:
            return False
        return self.key is None or leader.key is None or self.key == leader.key


def candidate(video: Video, prices: Prices, policy: Policy) -> Candidate:
    delivery_s = prices.delivery_seconds(video.cost_key)
    alone_s = video.steps_left * prices.seconds(video.cost_key, video.rows) + delivery_s
    own_target = video.created_at + policy.target_stretch * alone_s
    return Candidate(
        job_id=video.job_id,
        cost_key=video.cost_key,
        client=video.client,
        rows=video.rows,
        steps_left=video.steps_left,
        created_at=video.created_at,
        worth_s=video.priority * policy.aging_s,
        target_at=own_target if video.deadline_at is None else video.deadline_at,
        alone_s=alone_s,
        delivery_s=delivery_s,
    )
