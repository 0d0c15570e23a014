"""Claims: what the paper found, as a difference between two rows in one measure, and what the seeds say of it.

It owns the rule of the verdict; it knows nothing of how rows are trained or measured. Rows are paired by seed: both
were trained and sampled with it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["confirmed", "contradicted", "undecided"]
Figures = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Row -> seed -> measure -> value."""

LEVEL = 0.05
CRITICAL = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
"""Student's t that a one-sided test at `LEVEL` asks for, by degrees of freedom."""

RULE = """\
A claim compares two rows in one measure, seed by seed. Let d be the differences, signed so that above 0 is better;
where a claim is "no worse", its stated margin, a share of the other row's value, is added to d. With n seeds,
t = mean(d) / (sd(d) / √n). **Confirmed** is t above Student's one-sided 5 % point for n - 1 degrees of freedom (2.92
for three seeds), **contradicted** is t below minus that, everything else is **undecided**. Seeds that agree to the
last digit count as t = ±∞ by the sign of d, and as undecided where d is 0. Claims, measures and margins were written
down before the runs; no correction is made for their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`row` is better than `than` in `measure`, or no worse by more than `margin`."""

    name: str
    says: str
    """The finding in a sentence."""
    paper: str
    """Where in the paper, and its numbers."""
    row: str
    than: str
    measure: str
    higher_is_better: bool
    margin: float = 0.0
    """How much worse `row` may be, where the claim is that it is no worse; a share of the other row's value."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim with what the runs say of it."""

    claim: Claim
    differences: tuple[float, ...]
    """By seed, margin not added; above 0 is better."""
    row_mean: float
    than_mean: float
    t: float
    verdict: Verdict

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def standard_error(self) -> float:
        return statistics.stdev(self.differences) / math.sqrt(len(self.differences))


def judge(claim: Claim, figures: Figures) -> Finding:
    """The verdict by `RULE`, on the seeds that both rows have."""
    seeds = sorted(set(figures[claim.row]) & set(figures[claim.than]))
    if len(seeds) < 2:
        raise ValueError(f"claim '{claim.name}' has {len(seeds)} seeds in both rows; a spread needs at least 2")
    own = [_read(figures, claim.row, seed, claim.measure) for seed in seeds]
    other = [_read(figures, claim.than, seed, claim.measure) for seed in seeds]
    sign = 1.0 if claim.higher_is_better else -1.0
    differences = [sign * (a - b) for a, b in zip(own, other, strict=True)]
    allowed = [claim.margin * abs(value) for value in other]
    t = t_value([difference + extra for difference, extra in zip(differences, allowed, strict=True)])
    return Finding(
        claim, tuple(differences), statistics.fmean(own), statistics.fmean(other), t, verdict(t, len(seeds) - 1)
    )


def t_value(differences: Sequence[float]) -> float:
    """mean / (sd / √n); ±∞ where all are equal and not 0, 0 where all are 0."""
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread <= 1e-12 * abs(mean):
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / (spread / math.sqrt(len(differences)))


def verdict(t: float, freedom: int) -> Verdict:
    bound = CRITICAL[min(freedom, max(CRITICAL))]
    if t > bound:
        return "confirmed"
    return "contradicted" if t < -bound else "undecided"


def _read(figures: Figures, row: str, seed: int, measure: str) -> float:
    found = figures[row][seed]
    if measure not in found:
        raise ValueError(f"row '{row}' has no measure '{measure}'; it has {', '.join(sorted(found))}")
    return found[measure]
