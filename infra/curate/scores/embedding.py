"""Embeddings: frames as unit vectors that lie close where pictures look alike."""

from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from infra.curate.cut import Frame
from infra.curate.scores.network import PictureNetwork

Vectors = npt.NDArray[np.float32]

_GRID = 8


class Embedding(Protocol):
    """Frames to vectors."""

    model: str

    def embed(self, frames: list[Frame]) -> Vectors:
        """Unit vectors [N, D] of BGR frames; zeros where a frame has no structure at all."""
        ...


class Thumbnail:
    """Colours of an 8 by 8 thumbnail in CIE Lab, its mean taken off; no weights."""

    model = "8x8 Lab thumbnail"

    def embed(self, frames: list[Frame]) -> Vectors:
        rows = [cv2.resize(frame, (_GRID, _GRID), interpolation=cv2.INTER_AREA) for frame in frames]
        lab = np.stack([cv2.cvtColor(row, cv2.COLOR_BGR2LAB) for row in rows]).astype(np.float32)
        return unit((lab - lab.mean(axis=(1, 2), keepdims=True)).reshape(len(frames), -1))


class NetworkEmbedding:
    """Features of a network given as a file, such as CLIP's or DINOv2's picture tower."""

    def __init__(self, path: Path) -> None:
        self._network = PictureNetwork(path, "scores.embedding_network")
        self.model = self._network.model

    def embed(self, frames: list[Frame]) -> Vectors:
        return unit(self._network.run([frame[..., ::-1] for frame in frames]))


def unit(rows: npt.NDArray[np.floating]) -> Vectors:
    """Rows of length 1; of almost nothing, zeros."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norm > 1e-3, rows / np.maximum(norm, 1e-3), 0).astype(np.float32)
