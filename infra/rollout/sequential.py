"""Sequential tests of counts: they may be looked at after every batch, and their rate of false alarms holds for ever.

It owns the arithmetic; it knows nothing of canaries or Prometheus. Each test keeps a wealth that is, while the null
holds, a nonnegative supermartingale that starts at 1; by Ville's inequality it ever reaches 1/alpha with a probability
of at most alpha (Robbins; Johari et al., "Always valid inference"; Howard et al., "Time-uniform Chernoff bounds").
The wealth is a mixture over fixed alternatives, as in the mSPRT.
"""

import math
from collections.abc import Sequence

ODDS = (1.5, 2.0, 4.0, 8.0, 16.0, 64.0, 1024.0)
"""Alternatives of the two-sample test: odds ratios over the tolerated one."""
RATES = (0.25, 0.5, 0.75, 0.9, 0.99)
"""Alternatives of the one-sample test: shares of the way from the tolerated rate to 1."""


class _Mixture:
    """Wealth as the mean over alternatives, kept as logarithms."""

    def __init__(self, alternatives: Sequence[float]) -> None:
        self.alternatives = tuple(alternatives)
        self.logs = [0.0] * len(self.alternatives)
        self.largest = 0.0
        """The largest logarithm of the wealth so far: what was once shown stays shown."""

    @property
    def log_wealth(self) -> float:
        top = max(self.logs)
        return top + math.log(sum(math.exp(value - top) for value in self.logs) / len(self.logs))

    def rejects(self, alpha: float) -> bool:
        """Whether the null is refused at that rate of false alarms, over all looks together."""
        return self.largest >= -math.log(alpha)

    def _settle(self) -> None:
        self.largest = max(self.largest, self.log_wealth)


class WorseThanBaseline(_Mixture):
    """Is an event more frequent on the canary than beside it? Null: its odds are at most `tolerance` times the others'.

    A batch is `ours` events in `n` against `theirs` in `m`. Given how many events there were, ours follow Fisher's
    noncentral hypergeometric distribution, exact at any size and whatever the common rate does from batch to batch.
    """

    def __init__(self, tolerance: float = 1.0, odds: Sequence[float] = ODDS) -> None:
        if not tolerance > 0 or not all(ratio > 1 for ratio in odds):
            raise ValueError(f"tolerance {tolerance} must be above 0, and every alternative of {odds} above 1")
        super().__init__([tolerance * ratio for ratio in odds])
        self.tolerance = tolerance
        self.compared = 0
        """Our trials that met trials beside them."""
        self._kept = (0, 0, 0, 0)

    def update(self, ours: int, n: int, theirs: int, m: int) -> None:
        """Take one batch in; what one side only had is kept until the other had something too."""
        if not (0 <= ours <= n and 0 <= theirs <= m):
            raise ValueError(f"{ours} of {n} and {theirs} of {m} are no counts of events among trials")
        before = self._kept
        ours, n, theirs, m = self._kept = ours + before[0], n + before[1], theirs + before[2], m + before[3]
        if n == 0 or m == 0:
            return
        self._kept = (0, 0, 0, 0)
        self.compared += n
        events = ours + theirs
        if events == 0:
            return
        null = _log_probability(ours, events, n, m, self.tolerance)
        for place, odds in enumerate(self.alternatives):
            self.logs[place] += _log_probability(ours, events, n, m, odds) - null
        self._settle()


class WorseThanRate(_Mixture):
    """Is an event more frequent than `rate`? Null: each trial has it with a probability of at most `rate`."""

    def __init__(self, rate: float, shares: Sequence[float] = RATES) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"a tolerated rate of {rate} must lie between 0 and 1")
        super().__init__([rate + share * (1 - rate) for share in shares])
        self.rate = rate

    def update(self, events: int, n: int) -> None:
        """Take one batch of `n` trials in."""
        if not 0 <= events <= n:
            raise ValueError(f"{events} of {n} is no count of events among trials")
        for place, other in enumerate(self.alternatives):
            better = events * math.log(other / self.rate)
            self.logs[place] += better + (n - events) * math.log((1 - other) / (1 - self.rate))
        self._settle()


def _log_probability(ours: int, events: int, n: int, m: int, odds: float) -> float:
    """Of `ours` among `events`, drawn from n on our side and m on the other, where ours are `odds` times as likely."""
    low, high = max(0, events - m), min(events, n)
    terms = [_log_choose(n, k) + _log_choose(m, events - k) + k * math.log(odds) for k in range(low, high + 1)]
    top = max(terms)
    return terms[ours - low] - top - math.log(sum(math.exp(term - top) for term in terms))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
