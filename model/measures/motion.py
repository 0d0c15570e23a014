"""How much a clip moves, from classical optical flow: VBench's dynamic degree without its network.

It owns the flow and the threshold; it knows nothing of models. VBench asks RAFT; this asks OpenCV's DIS, which needs no
weights, so its figures compare clips with one another here and not with published ones.
"""

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
"""A clip [T, H, W, 3]."""

SIDE = 128
"""Frames are scaled to this shorter side, so that flow and threshold mean the same at every size."""
TOP_SHARE = 0.05
"""The fastest pixels that a pair of frames is judged by, as in VBench."""
THRESHOLD = 6 / 256
"""Share of the shorter side that these must move between frames, as in VBench."""
FPS = 8
"""Frames a second that flow is measured at, as in VBench; faster clips are thinned out."""


def dynamic_degree(clips: Sequence[Frames], *, fps: float = FPS) -> float:
    """Share of clips in [0, 1] that move: enough of their frame pairs (4 of 16 frames) exceed `THRESHOLD`."""
    return degree_and_flow(clips, fps=fps)[0]


def mean_flow(clips: Sequence[Frames], *, fps: float = FPS) -> float:
    """Mean over all frame pairs of the fastest pixels' flow, in shares of the shorter side."""
    return degree_and_flow(clips, fps=fps)[1]


def degree_and_flow(clips: Sequence[Frames], *, fps: float = FPS) -> tuple[float, float]:
    """`dynamic_degree` and `mean_flow` for the price of one."""
    if len(clips) == 0:
        raise ValueError("no clips to measure: give at least one")
    flows = [pair_flows(clip, fps=fps) for clip in clips]
    return sum(map(_moves, flows)) / len(flows), float(np.mean([each.mean() for each in flows]))


def has_pairs(num_frames: int, fps: float) -> bool:
    """Whether a clip is long enough for its motion to be measured."""
    return num_frames > max(1, round(fps / FPS))


def pair_flows(clip: Frames, *, fps: float = FPS) -> npt.NDArray[np.float64]:
    """Flow of the fastest `TOP_SHARE` of pixels between consecutive frames [T - 1], in shares of the shorter side."""
    thinned = clip[:: max(1, round(fps / FPS))]
    if not has_pairs(len(clip), fps):
        raise ValueError(f"a clip of {len(clip)} frames at {fps:g} fps has no pair {1 / FPS:g} s apart; give more")
    grey = [_grey(frame) for frame in thinned]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows: list[float] = []
    for before, after in pairwise(grey):
        flow = dis.calc(before, after, np.zeros((*before.shape, 2), np.float32))
        lengths = np.hypot(flow[..., 0], flow[..., 1]).ravel()
        fastest = int(lengths.size * TOP_SHARE)
        flows.append(float(np.partition(lengths, -fastest)[-fastest:].mean()) / SIDE)
    return np.array(flows)


def _moves(flows: npt.NDArray[np.float64]) -> bool:
    # VBench's rule; its rounding would ask nothing at all of clips of one or two frames.
    needed = max(1, round(4 * (len(flows) + 1) / 16))
    return int((flows > THRESHOLD).sum()) >= needed


def _grey(frame: Frames) -> npt.NDArray[np.uint8]:
    scale = SIDE / min(frame.shape[:2])
    size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, size, interpolation=shrink).astype(np.uint8)
