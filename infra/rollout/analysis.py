"""The verdict on a canary: batch after batch of figures of both tracks becomes pass, fail or inconclusive.

It owns the checks and their limits; it knows nothing of where figures come from or what a verdict leads to. All tests
are sequential and share one rate of false aborts: a canary as good as stable is refused with a probability of at most
`false_abort_rate`, however long and however often it is looked at.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from infra.rollout.counts import Batch, Look
from infra.rollout.sequential import WorseThanBaseline, WorseThanRate
from infra.serving.jobs.table import Track
from model.config import Config, Positive

Verdict = Literal["pass", "fail", "inconclusive"]
Share = Annotated[float, Field(gt=0, lt=1)]
SEQUENTIAL = 4
"""Tests that share the rate of false aborts."""
SLOW_QUANTILE = 0.9
"""A video is slow if it takes longer than about nine in ten of stable's of its class."""
BASELINE = 10
"""Videos of a class that stable must have made before the canary's are compared with them."""


class AnalysisLimits(Config):
    """What a canary is held to."""

    false_abort_rate: Share = 0.01
    """Of a canary that is as good as stable, over all tests and all looks."""
    min_samples: Positive = 50
    """Videos that a canary must have ended at a weight before it can pass there."""
    objective: Share = 0.99
    """Share of videos that shall be made: the SLO."""
    max_burn: Annotated[float, Field(gt=1)] = 14.4
    """Times the error budget that may burn; the SRE workbook's rate that wakes somebody up."""
    error_tolerance: Annotated[float, Field(ge=1)] = 1.0
    """Odds of a failed video over stable's that are not worth an abort."""
    slow_tolerance: Annotated[float, Field(ge=1)] = 2.0
    """Odds of a slow video over stable's that are not worth an abort: a canary with fewer requests batches less."""
    blank_tolerance: Annotated[float, Field(ge=1)] = 1.0
    max_memory_ratio: Annotated[float, Field(gt=1)] = 1.5
    """Over stable's."""
    max_restarts: Annotated[int, Field(ge=0)] = 1
    """A canary that starts anew oftener is flapping."""
    max_silent_looks: Positive = 3
    """Looks in a row at which the canary was not ready."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check's word."""

    name: str
    verdict: Verdict
    words: str


@dataclass(frozen=True, slots=True)
class Judgement:
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """One failed check is enough to fail; all must pass to pass."""
        verdicts = {check.verdict for check in self.checks}
        return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"

    @property
    def words(self) -> str:
        """Why it is not a pass, or that it is."""
        odd = [f"{check.name}: {check.words}" for check in self.checks if check.verdict == self.verdict != "pass"]
        return "; ".join(odd) or "every check passed"


@dataclass(frozen=True, slots=True)
class Standing:
    """What the fleet says of the canary, beside Prometheus."""

    ready: bool
    restarts: int


class Analysis:
    """Of one canary, from its first request on. `judge` is called once a look."""

    def __init__(self, limits: AnalysisLimits) -> None:
        self.limits = limits
        self.total = {"stable": Batch(), "canary": Batch()}
        self._alpha = limits.false_abort_rate / SEQUENTIAL
        self._errors = WorseThanBaseline(limits.error_tolerance)
        self._burn = WorseThanRate(min(0.9, limits.max_burn * (1 - limits.objective)))
        self._slow = WorseThanBaseline(limits.slow_tolerance)
        self._blank = WorseThanBaseline(limits.blank_tolerance)
        self._compared_before = 0
        self._ended_at_weight = 0
        self._silent = 0

    def new_weight(self) -> None:
        """The minimum of samples begins anew; the evidence against the canary stays."""
        self._ended_at_weight = 0
        self._compared_before = self._slow.compared

    def judge(self, look: Look | None, standing: Standing) -> Judgement:
        """`look` is None where Prometheus gave no answer: nothing is concluded from silence."""
        if look is not None:
            self._take_in(look)
        self._silent = 0 if standing.ready else self._silent + 1
        return Judgement(tuple(self._checks(look, standing)))

    def _take_in(self, look: Look) -> None:
        ours, theirs = look.batches["canary"], look.batches["stable"]
        self._errors.update(ours.bad, ours.ended, theirs.bad, theirs.ended)
        self._burn.update(ours.bad, ours.ended)
        videos, others = ours.completed, theirs.completed
        self._blank.update(min(_videos(ours), videos), videos, min(_videos(theirs), others), others)
        self._compare_latency(ours, theirs)
        for track, batch in look.batches.items():
            _merge(self.total[track], batch)
        self._ended_at_weight += ours.ended

    def _compare_latency(self, ours: Batch, theirs: Batch) -> None:
        """The edge that tells slow from not is stable's before this batch, so the batch cannot choose it."""
        for work, edges in ours.within.items():
            edge = _slow_edge(self.total["stable"].within.get(work, {}))
            if edge is None:
                continue
            others = theirs.within.get(work, {})
            n, m = edges[float("inf")], others.get(float("inf"), 0)
            self._slow.update(n - edges.get(edge, n), n, m - others.get(edge, m), m)

    def _checks(self, look: Look | None, standing: Standing) -> Iterator[Check]:
        limits = self.limits
        if standing.restarts > limits.max_restarts:
            yield Check("restarts", "fail", f"the canary was started anew {standing.restarts} times")
        else:
            yield Check("restarts", "pass", f"{standing.restarts}, at most {limits.max_restarts}")
        if self._silent >= limits.max_silent_looks:
            yield Check("ready", "fail", f"not ready at {self._silent} looks in a row")
        else:
            yield Check("ready", "pass" if standing.ready else "inconclusive", f"not ready at {self._silent} looks")
        yield self._scraped(look)
        yield self._sampled("samples", self._ended_at_weight, "videos ended at this weight")
        compared = self._slow.compared - self._compared_before
        yield self._sampled("latency samples", compared, "videos compared with stable's of their class")
        errors, all_ours = self.total["canary"].bad, self.total["canary"].ended
        theirs = self.total["stable"]
        beside = f"{errors} of {all_ours} videos failed, {theirs.bad} of {theirs.ended} on stable"
        yield self._tested("errors", self._errors, beside)
        yield self._tested("error budget", self._burn, f"{errors} of {all_ours}, at most {self._burn.rate:.1%}")
        yield self._tested("latency", self._slow, f"{self._slow.compared} videos, against stable's slowest tenth")
        blank = f"{self.total['canary'].blank} of {self.total['canary'].frames} frames"
        yield self._tested("blank frames", self._blank, blank)
        yield self._memory(look)

    def _scraped(self, look: Look | None) -> Check:
        if look is None:
            return Check("metrics", "inconclusive", "Prometheus gives no answer")
        down = [track for track, up in look.up.items() if not up]
        words = f"Prometheus cannot read {' and '.join(down)}" if down else "both are read"
        return Check("metrics", "inconclusive" if down else "pass", words)

    def _sampled(self, name: str, found: int, what: str) -> Check:
        enough = found >= self.limits.min_samples
        return Check(name, "pass" if enough else "inconclusive", f"{found} of {self.limits.min_samples} {what}")

    def _tested(self, name: str, test: WorseThanBaseline | WorseThanRate, words: str) -> Check:
        return Check(name, "fail" if test.rejects(self._alpha) else "pass", words)

    def _memory(self, look: Look | None) -> Check:
        found: Mapping[Track, float] = {} if look is None else look.memory_bytes
        if "canary" not in found or "stable" not in found:
            return Check("memory", "inconclusive", "not known of both")
        ratio = found["canary"] / max(1.0, found["stable"])
        limit = self.limits.max_memory_ratio
        return Check("memory", "pass" if ratio <= limit else "fail", f"{ratio:.2f} times stable's, at most {limit:g}")


def _videos(batch: Batch) -> int:
    """Videos' worth of blank frames: frames of a video go blank together, so they are not trials of their own."""
    if batch.blank == 0 or batch.completed == 0:
        return 0
    return max(1, round(batch.blank * batch.completed / max(1, batch.frames)))


def _slow_edge(within: dict[float, int]) -> float | None:
    """The smallest edge that nine in ten of stable's videos keep; None where too few were made."""
    total = within.get(float("inf"), 0)
    if total < BASELINE:
        return None
    edge = min(edge for edge, count in within.items() if count >= SLOW_QUANTILE * total)
    return None if edge == float("inf") else edge


def _merge(total: Batch, batch: Batch) -> None:
    total.completed += batch.completed
    total.bad += batch.bad
    total.frames += batch.frames
    total.blank += batch.blank
    for work, edges in batch.within.items():
        kept = total.within.setdefault(work, {})
        for edge, count in edges.items():
            kept[edge] = kept.get(edge, 0) + count
