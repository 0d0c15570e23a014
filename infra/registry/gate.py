"""The gate: an artifact's rules held against its figures and the champion's, and the refusal that follows.

It owns how a rule is judged; it does not know where figures come from or what is promoted.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from infra.registry.bootstrap import FEWEST, mean_interval
from infra.registry.records import Comparison, GateReport, GateResult
from model.config import ChampionRule, GateRule, Rule
from model.measures.samples import SampleFigures

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class PromotionRefused(ValueError):
    """A gate did not pass and nobody overrode it; the ref is as it was."""

    def __init__(self, ref: str, digest: str, gate: GateReport) -> None:
        failed = [result for result in gate.rules if not result.passed]
        way_out = "evaluate and publish it anew" if any(result.value is None for result in failed) else "train on"
        super().__init__(
            f"'{ref}' is not moved to {digest}: {'; '.join(result.reason for result in failed)}; {way_out}, or promote"
            " with an override that says why"
        )
        self.gate = gate


@dataclass(frozen=True, slots=True)
class Champion:
    """What a ref points at now, as the gate sees it."""

    digest: str
    samples: SampleFigures | None
    """None of one that was published without."""


class _NoPairs(ValueError):
    """Candidate and champion cannot be compared; the message is the rule's reason."""


def evaluate_gate(
    rules: Sequence[Rule],
    metrics: Mapping[str, float],
    samples: SampleFigures | None = None,
    champion: Champion | None = None,
) -> GateReport:
    """Hold figures against rules; one that is missing or NaN, or does not pair with the champion's, fails its rule."""
    if not rules:
        raise ValueError("a gate without a rule could never refuse; publish the artifact with at least one")
    results = tuple(
        _bounded(rule, metrics.get(rule.metric))
        if isinstance(rule, GateRule)
        else _beside(rule, metrics.get(rule.metric), samples, champion)
        for rule in rules
    )
    return GateReport(
        passed=all(result.passed for result in results), rules=results, champion=champion.digest if champion else None
    )


def _bounded(rule: GateRule, value: float | None) -> GateResult:
    wanted = f"must be {rule.wanted}"
    if value is None or math.isnan(value):
        value, passed, reason = None, False, f"{rule.metric} is {'missing' if value is None else 'nan'}, {wanted}"
    else:
        passed, reason = _HOLDS[rule.op](value, rule.bound), f"{rule.metric} = {value:.6g}, {wanted}"
    return GateResult(rule=rule, value=value, passed=passed, reason=reason)


def _beside(
    rule: ChampionRule, value: float | None, samples: SampleFigures | None, champion: Champion | None
) -> GateResult:
    if value is None or math.isnan(value):
        reason = f"{rule.metric} is {'missing' if value is None else 'nan'}, may be {rule.wanted}"
        return GateResult(rule=rule, value=None, passed=False, reason=reason)
    if champion is None:
        reason = f"{rule.metric} = {value:.6g}, passed unseen: there is no champion yet to be worse than"
        return GateResult(rule=rule, value=value, passed=True, reason=reason)
    try:
        found = _compare(rule, samples, champion)
    except _NoPairs as error:
        reason = f"{rule.metric} cannot be compared with champion {champion.digest[:16]}: {error}"
        return GateResult(rule=rule, value=value, passed=False, reason=reason)
    passed = found.high <= rule.not_worse_by
    reason = (
        f"{rule.metric} is worse than champion {champion.digest[:16]} by {found.worse_by:.4g}"
        f" [{found.low:.4g}, {found.high:.4g}] on {found.samples} samples"
        f" ({rule.confidence:.0%} paired bootstrap, {rule.resamples} resamples), may be by {rule.not_worse_by:g}"
    )
    return GateResult(rule=rule, value=value, passed=passed, reason=reason, comparison=found)


def _compare(rule: ChampionRule, samples: SampleFigures | None, champion: Champion) -> Comparison:
    pairs = _pairs(rule.metric, samples, champion.samples)
    sign = 1.0 if rule.better == "lower" else -1.0
    differences = [sign * (candidate - standing) for candidate, standing in pairs]
    if len(differences) < FEWEST:
        raise _NoPairs(f"{len(differences)} samples are too few for an interval, which takes {FEWEST}")
    if not all(map(math.isfinite, differences)):
        raise _NoPairs("some of its samples are nan or infinite")
    worse_by, low, high = mean_interval(
        differences, confidence=rule.confidence, resamples=rule.resamples, seed=rule.seed
    )
    return Comparison(samples=len(differences), worse_by=worse_by, low=low, high=high)


def _pairs(metric: str, ours: SampleFigures | None, theirs: SampleFigures | None) -> list[tuple[float, float]]:
    """(candidate, champion) of every sample; `_NoPairs` says why there are none."""
    for who, given in (("it", ours), ("the champion", theirs)):
        if given is None:
            raise _NoPairs(f"{who} was published without figures by sample; evaluate and publish it anew")
        if metric not in given.figures:
            raise _NoPairs(f"{who} has no figures by sample of that metric, only of {sorted(given.figures)}")
    assert ours is not None and theirs is not None
    names = sorted(ours.conditions.keys() | theirs.conditions.keys())
    for name in names:
        one, other = ours.conditions.get(name), theirs.conditions.get(name)
        if one != other:
            raise _NoPairs(f"they were measured under different conditions: {name} is {one}, the champion's {other}")
    mine, standing = ours.figures[metric], theirs.figures[metric]
    if mine.keys() != standing.keys():
        odd = sorted(mine.keys() ^ standing.keys())
        raise _NoPairs(f"the samples do not pair: {len(odd)} are of one of them only, such as '{odd[0]}'")
    return [(mine[sample], standing[sample]) for sample in sorted(mine)]
