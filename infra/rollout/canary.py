"""The canary: step by step it gets more requests, and at each look it goes on, is promoted or goes back.

It owns the order and the deadline; it knows nothing of processes or pods (`Fleet`), nor of how a figure is judged
(`analysis`). What cannot be judged holds where it stands until the deadline, and then goes back.
"""

import logging
import time
from collections.abc import Callable
from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from infra.rollout.analysis import Analysis, AnalysisLimits, Check, Judgement, Standing, Verdict
from infra.rollout.counts import Counts, Look
from infra.rollout.probe import Backends, ProbeSettings, probe
from infra.rollout.prometheus import Prometheus, PrometheusUnreachable
from model.config import Config

logger = logging.getLogger(__name__)

Seconds = Annotated[float, Field(gt=0)]


class Fleet(Protocol):
    """Where servers run: two processes here, two Deployments in a cluster."""

    @property
    def stable_engine(self) -> str:
        """Digest."""
        ...

    @property
    def canary_engine(self) -> str | None: ...

    def start_canary(self, engine: str) -> None: ...

    def await_canary(self) -> bool: ...

    def set_weight(self, percent: int) -> None: ...

    def standing(self) -> Standing: ...

    def backends(self) -> Backends: ...

    def promote(self) -> None: ...

    def abort(self) -> None: ...


class CanaryPlan(Config):
    """How a canary is led."""

    weights: Annotated[tuple[Annotated[int, Field(ge=1, le=100)], ...], Field(min_length=1)] = (10, 50)
    """Percent of new videos, one after the other."""
    look_every_s: Seconds = 15.0
    """At least as long as Prometheus takes to scrape anew."""
    deadline_s: Seconds = 6 * 3600.0
    """Of the whole canary; one that is inconclusive by then goes back."""
    limits: AnalysisLimits = AnalysisLimits()
    probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="after")
    def _weights_rise(self) -> "CanaryPlan":
        if list(self.weights) != sorted(set(self.weights)):
            raise ValueError(f"weights {self.weights} must rise from step to step, such as 10, 50")
        return self


class Observation(Config):
    """One look, as the record keeps it."""

    at: float
    """Seconds since the canary began."""
    weight: int
    verdict: Verdict
    words: str
    checks: tuple[tuple[str, Verdict, str], ...]


class Outcome(Config):
    """How a canary ended."""

    decision: Literal["promote", "abort"]
    reason: str
    seconds: float
    seconds_to_roll_back: float | None = None
    """From the look that decided until no request went to the canary and stable had what waited for it."""
    observations: tuple[Observation, ...]


OnLook = Callable[[Observation], None]


class Canary:
    def __init__(self, fleet: Fleet, prometheus: Prometheus, plan: CanaryPlan, on_look: OnLook | None = None) -> None:
        self.fleet = fleet
        self.plan = plan
        self.on_look = on_look
        self.observations: list[Observation] = []
        self._counts = Counts(prometheus)
        self._analysis = Analysis(plan.limits)
        self._began = time.monotonic()

    def run(self, engine: str, *, same_weights: bool) -> Outcome:
        """Lead a canary of `engine` to its end. Promotion itself is left to the caller; a canary that fails is gone.

        Raises:
            PrometheusUnreachable: before anything is started.
        """
        self._counts.prometheus.require_ready()
        self._began = time.monotonic()
        self.fleet.start_canary(engine)
        if not self.fleet.await_canary():
            return self._abort(Check("start", "fail", "the canary did not become ready, see its log"))
        checked = probe(self.fleet.backends(), self.plan.probe, same_weights=same_weights)
        if checked.verdict != "pass":
            return self._abort(checked)
        self._observe(0, Judgement((checked,)))
        self._look()
        for weight in self.plan.weights:
            self.fleet.set_weight(weight)
            self._analysis.new_weight()
            ended = self._hold(engine, weight)
            if ended is not None:
                return ended
        return self._outcome("promote", "every check passed at every weight")

    def _hold(self, engine: str, weight: int) -> Outcome | None:
        """Look until the canary passes at this weight (None) or ends."""
        while True:
            time.sleep(self.plan.look_every_s)
            if self.fleet.canary_engine != engine:
                taken = self.fleet.stable_engine == engine
                return self._outcome("promote" if taken else "abort", f"{'promoted' if taken else 'aborted'} by hand")
            judgement = self._analysis.judge(self._look(), self.fleet.standing())
            self._observe(weight, judgement)
            if judgement.verdict == "pass":
                return None
            if judgement.verdict == "fail":
                return self._abort(next(check for check in judgement.checks if check.verdict == "fail"))
            if time.monotonic() - self._began > self.plan.deadline_s:
                words = f"inconclusive after {self.plan.deadline_s:g} s: {judgement.words}"
                return self._abort(Check("deadline", "fail", words))

    def _look(self) -> Look | None:
        try:
            return self._counts.look()
        except PrometheusUnreachable as error:
            logger.warning("nothing is concluded from this look: %s", error)
            return None

    def _observe(self, weight: int, judgement: Judgement) -> None:
        seen = Observation(
            at=round(time.monotonic() - self._began, 3),
            weight=weight,
            verdict=judgement.verdict,
            words=judgement.words,
            checks=tuple((check.name, check.verdict, check.words) for check in judgement.checks),
        )
        self.observations.append(seen)
        logger.info("canary at %s %%: %s, %s", weight, seen.verdict, seen.words)
        if self.on_look is not None:
            self.on_look(seen)

    def _abort(self, check: Check) -> Outcome:
        if not self.observations or check.name in ("start", "probe"):
            self._observe(0, Judgement((check,)))
        decided = time.monotonic()
        self.fleet.abort()
        return self._outcome("abort", f"{check.name}: {check.words}", time.monotonic() - decided)

    def _outcome(self, decision: Literal["promote", "abort"], reason: str, back_s: float | None = None) -> Outcome:
        return Outcome(
            decision=decision,
            reason=reason,
            seconds=round(time.monotonic() - self._began, 3),
            seconds_to_roll_back=back_s,
            observations=tuple(self.observations),
        )
