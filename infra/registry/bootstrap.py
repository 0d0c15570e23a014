"""The paired bootstrap: how sure a mean difference is, from the samples alone; it does not know what is compared."""

from collections.abc import Sequence

import numpy as np

FEWEST = 8
"""Pairs below which an interval from resampling promises more than it holds."""
_AT_ONCE = 1 << 22


def mean_interval(
    differences: Sequence[float], *, confidence: float, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of paired differences, and the ends of its percentile bootstrap interval (Efron 1979); same seed, same ends.

    Args:
        differences: one a pair, at least `FEWEST`, all finite. confidence: level of the two-sided interval.
    """
    values = np.asarray(differences, np.float64)
    if values.size < FEWEST or not np.isfinite(values).all():
        raise ValueError(f"{values.size} differences, {np.isfinite(values).sum()} finite: give {FEWEST} finite ones")
    rng = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // values.size)
    means = np.concatenate(
        [
            values[rng.integers(values.size, size=(min(rows, resamples - first), values.size))].mean(axis=1)
            for first in range(0, resamples, rows)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(values.mean()), float(low), float(high)
