"""What an engine call costs, learnt from the calls: seconds by shape bucket and engine rows.

It owns the fit and what is assumed before anything was measured; it knows nothing of the order in which videos are
served. Within a bucket a call of n engine rows takes `call_s + n * row_s`: what every call costs, and what a row adds.
Older calls count less, so that a machine that became slower is seen, and one call that took very long (a compilation,
a page fault) counts as `OUTLIER` times the expected at most.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any, Self

MEMORY = 200
"""Calls after which one counts by 1/e."""
OUTLIER = 4.0
TRUSTED_AFTER = 5
"""Calls of a bucket before the next may look like an outlier."""
PRIOR_WEIGHT = 0.5
"""Of each of the two calls that stand for what is assumed, against 1 for a call that was made."""
PRIOR_ROWS = (1, 8)
LEAST_S = 1e-6
_DELIVERY_WEIGHT = 0.2
"""Of the latest delivery, against all before it."""


@cache
def volume(cost_key: str) -> int:
    """Pixels of a bucket's clip: '8x256x256' (frames, height, width) has 8 * 256 * 256."""
    try:
        return prod(int(side) for side in cost_key.split("x"))
    except ValueError:
        raise ValueError(f"cost_key '{cost_key}' must be FRAMESxHEIGHTxWIDTH, like 8x256x256") from None


@dataclass(frozen=True, slots=True)
class Prices:
    """A snapshot of what is known of costs. Any process may read it, and JSON can carry it."""

    buckets: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Bucket -> (call_s, row_s)."""
    call_s: float = 0.005
    """Of a bucket that has made no call yet."""
    megapixel_s: float = 0.05
    """What an engine row of 10^6 pixels adds to such a call."""
    deliveries: Mapping[str, float] = field(default_factory=dict[str, float])
    """Bucket -> seconds from a video's last step to its file."""
    delivery_megapixel_s: float = 0.05

    def seconds(self, cost_key: str, rows: int) -> float:
        """Of one call with `rows` engine rows; never falls with more rows."""
        call_s, row_s = self.line(cost_key)
        return max(call_s + row_s * rows, LEAST_S)

    def line(self, cost_key: str) -> tuple[float, float]:
        known = self.buckets.get(cost_key)
        return known if known is not None else (self.call_s, self.megapixel_s * volume(cost_key) / 1e6)

    def delivery_seconds(self, cost_key: str) -> float:
        """From a video's last step to its file: decoding, encoding, storing."""
        known = self.deliveries.get(cost_key)
        return known if known is not None else self.delivery_megapixel_s * volume(cost_key) / 1e6

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        buckets = {key: (float(line[0]), float(line[1])) for key, line in value["buckets"].items()}
        return cls(
            buckets=buckets,
            call_s=value["call_s"],
            megapixel_s=value["megapixel_s"],
            deliveries=value["deliveries"],
            delivery_megapixel_s=value["delivery_megapixel_s"],
        )


@dataclass(slots=True)
class _Fit:
    """A weighted least-squares line through (x, seconds) whose slope and intercept are not below zero."""

    weight: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        self.weight += weight
        self.x += weight * x
        self.xx += weight * x * x
        self.y += weight * y
        self.xy += weight * x * y

    def fade(self, factor: float) -> None:
        self.weight *= factor
        self.x *= factor
        self.xx *= factor
        self.y *= factor
        self.xy *= factor

    def line(self) -> tuple[float, float]:
        """Intercept and slope."""
        spread = self.weight * self.xx - self.x * self.x
        slope = (self.weight * self.xy - self.x * self.y) / spread if spread > 0 else 0.0
        intercept = (self.y - slope * self.x) / self.weight
        if slope < 0:
            return self.y / self.weight, 0.0
        if intercept < 0:
            return 0.0, self.xy / self.xx
        return intercept, slope

    def with_calls(self, calls: Mapping[float, float], weight: float) -> "_Fit":
        fit = replace(self)
        for x, y in calls.items():
            fit.add(x, y, weight)
        return fit


class CostModel:
    """Learns `Prices`. Buckets that made no call are priced by a line over rows x pixels through the calls of all."""

    def __init__(self, assumed: Prices | None = None) -> None:
        """`assumed` is what calls cost before any was made."""
        self._assumed = self.prices = assumed or Prices()
        self._all = _Fit()
        self._buckets: dict[str, _Fit] = {}

    def seconds(self, cost_key: str, rows: int) -> float:
        return self.prices.seconds(cost_key, rows)

    def observe(self, cost_key: str, rows: int, seconds: float) -> None:
        """A call with `rows` engine rows took `seconds`."""
        if rows < 1:
            return
        fit = self._buckets.setdefault(cost_key, _Fit())
        if fit.weight >= TRUSTED_AFTER:
            seconds = min(seconds, OUTLIER * self.seconds(cost_key, rows))
        fading = 1 - 1 / MEMORY
        for one in (fit, self._all):
            one.fade(fading)
        fit.add(rows, seconds)
        self._all.add(rows * volume(cost_key) / 1e6, seconds)
        self._price(cost_key, fit)

    def observe_delivery(self, cost_key: str, seconds: float) -> None:
        before = self.prices.deliveries.get(cost_key, seconds)
        deliveries = {**self.prices.deliveries, cost_key: before + _DELIVERY_WEIGHT * (seconds - before)}
        per_megapixel = sum(s / volume(key) for key, s in deliveries.items()) / len(deliveries) * 1e6
        self.prices = replace(self.prices, deliveries=deliveries, delivery_megapixel_s=per_megapixel)

    def _price(self, cost_key: str, fit: _Fit) -> None:
        assumed, middle = self._assumed, self._all.x / self._all.weight
        guesses = {0.0: assumed.call_s, middle: assumed.call_s + assumed.megapixel_s * middle}
        call_s, megapixel_s = self._all.with_calls(guesses, PRIOR_WEIGHT / 10).line()
        unseen = Prices(call_s=call_s, megapixel_s=megapixel_s)
        guesses = {float(rows): unseen.seconds(cost_key, rows) for rows in PRIOR_ROWS}
        buckets = {**self.prices.buckets, cost_key: fit.with_calls(guesses, PRIOR_WEIGHT).line()}
        self.prices = replace(self.prices, buckets=buckets, call_s=call_s, megapixel_s=megapixel_s)
