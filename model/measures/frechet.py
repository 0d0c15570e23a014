"""Distances between sets of features: Fréchet distance (FID, FVD) and Inception Score.

It owns the arithmetic, in float64; it knows nothing of which network gave the features (`features`).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features [N, D] and [M, D]; the rows need not outnumber D.

    |mean_a - mean_b|² + tr A + tr B - 2 tr (AB)^1/2, A and B the covariances. The last trace is the nuclear norm of
    the product of the centred features, so that no matrix root is taken, which is inexact where N < D.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"features {tuple(features.shape)} must be [N, D] with at least 2 rows to have a spread")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features of {features_a.shape[1]} and {features_b.shape[1]} values are not of one extractor; use the same"
        )
    mean_a, root_a = _gaussian(features_a)
    mean_b, root_b = _gaussian(features_b)
    crossed = np.linalg.norm(root_a @ root_b.T, "nuc")
    distance = ((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * crossed
    return max(0.0, float(distance))


def inception_score(probabilities: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of each row [N, classes] from its split's mean: mean and sd over `splits`.

    Splits are interleaved rows, so that an order by class does not change them.
    """
    rows = probabilities.double()
    if rows.ndim != 2 or not 1 <= splits <= rows.shape[0]:
        raise ValueError(f"{splits} splits of probabilities {tuple(rows.shape)}: every split needs at least one row")
    if rows.min() < 0 or not torch.allclose(rows.sum(dim=1), torch.ones(len(rows), dtype=rows.dtype), atol=1e-3):
        raise ValueError("these rows are no probabilities: they must be at least 0 and sum to 1; apply a softmax")
    scores: list[Tensor] = []
    for first in range(splits):
        part = rows[first::splits]
        mean = part.mean(dim=0)
        divergence = torch.xlogy(part, part).sum(dim=1).mean() - torch.xlogy(mean, mean).sum()
        scores.append(divergence.exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


def _gaussian(features: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean [D] and a triangular root R [min(N, D), D] of the covariance: RᵀR."""
    rows = features.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(rows).all():
        raise ValueError("features hold infinite values or NaN; look at the clips and at the extractor")
    mean = rows.mean(axis=0)
    return mean, np.asarray(np.linalg.qr((rows - mean) / (len(rows) - 1) ** 0.5, mode="r"))
