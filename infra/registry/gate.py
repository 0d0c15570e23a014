"""The gate: rules held against figures, and the refusal that follows.

It owns how a rule is judged; it does not know where figures come from or what is promoted.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence

from infra.registry.records import GateReport, GateResult
from model.config import GateRule

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def evaluate_gate(rules: Sequence[GateRule], metrics: Mapping[str, float]) -> GateReport:
    """Hold the metrics against the rules; one that is missing or NaN fails its rule."""
    if not rules:
        raise ValueError("a gate without a rule could never refuse; give it at least one")
    results = tuple(_evaluate(rule, metrics.get(rule.metric)) for rule in rules)
    return GateReport(passed=all(result.passed for result in results), rules=results)


def _evaluate(rule: GateRule, value: float | None) -> GateResult:
    wanted = f"must be {rule.op} {rule.bound:g}"
    if value is None or math.isnan(value):
        value, passed, reason = None, False, f"{rule.metric} is {'missing' if value is None else 'nan'}, {wanted}"
    else:
        passed, reason = _HOLDS[rule.op](value, rule.bound), f"{rule.metric} = {value:.6g}, {wanted}"
    return GateResult(metric=rule.metric, op=rule.op, bound=rule.bound, value=value, passed=passed, reason=reason)


class PromotionRefused(ValueError):
    """A gate did not pass and nobody overrode it; the ref is as it was."""

    def __init__(self, ref: str, digest: str, gate: GateReport) -> None:
        failed = "; ".join(rule.reason for rule in gate.rules if not rule.passed)
        super().__init__(
            f"'{ref}' is not moved to {digest}: {failed}; train on, or promote with an override that says why"
        )
        self.gate = gate
