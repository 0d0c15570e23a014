"""How near two clips are, frame by frame: PSNR, SSIM, and a perceptual distance where a network is given (LPIPS).

It owns the arithmetic on pixels; it knows nothing of which clip was meant to be like which.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.measures.motion import Frames

WINDOW = 11
SIGMA = 1.5
"""SSIM's Gaussian window, as in its paper (Wang et al. 2004)."""
LARGEST_PSNR = 99.0
"""dB of equal pictures, whose PSNR is infinite."""


def psnr(clip: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB of two clips [T, H, W, 3], the mean over frames."""
    _require_same(clip, reference)
    errors = ((clip.astype(np.float64) - reference.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean([min(LARGEST_PSNR, 10 * math.log10(255.0**2 / max(error, 1e-12))) for error in errors]))


def ssim(clip: Frames, reference: Frames) -> float:
    """Structural similarity of two clips [T, H, W, 3], the mean over frames, channels and whole windows."""
    _require_same(clip, reference)
    if min(clip.shape[1:3]) < WINDOW:
        raise ValueError(f"frames of {clip.shape[1]}x{clip.shape[2]} are smaller than SSIM's window of {WINDOW}")
    one, other = _channels(clip), _channels(reference)
    mean_one, mean_other = _blurred(one), _blurred(other)
    variance_one = _blurred(one * one) - mean_one**2
    variance_other = _blurred(other * other) - mean_other**2
    covariance = _blurred(one * other) - mean_one * mean_other
    small, smaller = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_one * mean_other + small) / (mean_one**2 + mean_other**2 + small)
    structure = (2 * covariance + smaller) / (variance_one + variance_other + smaller)
    return float((light * structure).mean())


def _require_same(clip: Frames, reference: Frames) -> None:
    if clip.shape != reference.shape:
        raise ValueError(f"clips of shape {clip.shape} and {reference.shape} have no frames to compare; cut them alike")


def _channels(clip: Frames) -> Tensor:
    """[T * 3, 1, H, W] in [0, 255]."""
    frames = torch.as_tensor(clip.astype(np.float64)).permute(0, 3, 1, 2)
    return frames.reshape(-1, 1, *frames.shape[2:])


def _blurred(pictures: Tensor) -> Tensor:
    """Means under the Gaussian window wherever it fits whole."""
    places = torch.arange(WINDOW, dtype=pictures.dtype) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    across = functional.conv2d(pictures, weights.view(1, 1, 1, -1))
    return functional.conv2d(across, weights.view(1, 1, -1, 1))
