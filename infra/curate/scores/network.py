"""A network over pictures, given as an ONNX file: how pictures are prepared for it and run."""

from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from infra.curate.cut import Frame

_SIDE = 224
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own, of RGB in [0, 1]."""


class PictureNetwork:
    """Pictures [N, 3, 224, 224], scaled to cover and cropped in the middle as CLIP does, -> rows [N, D]."""

    def __init__(self, path: Path, key: str) -> None:
        if not path.is_file():
            raise ValueError(f"{key} {path}: no such file; give an ONNX file or leave it out")
        self.model = f"ONNX {path.name}"
        runtime: Any = import_module("onnxruntime")
        self._session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ValueError(f"{key} {path} has {len(inputs)} inputs; it must take pictures [N, 3, 224, 224] alone")
        self._input = inputs[0].name

    def run(self, frames: list[Frame]) -> npt.NDArray[np.float32]:
        pictures = np.stack([_prepared(frame) for frame in frames])
        return np.asarray(self._session.run(None, {self._input: pictures})[0], np.float32).reshape(len(frames), -1)


def _prepared(frame: Frame) -> npt.NDArray[np.float32]:
    scale = _SIDE / min(frame.shape[:2])
    size = (max(_SIDE, round(frame.shape[1] * scale)), max(_SIDE, round(frame.shape[0] * scale)))
    scaled = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    top, left = (size[1] - _SIDE) // 2, (size[0] - _SIDE) // 2
    pixels = scaled[top : top + _SIDE, left : left + _SIDE].astype(np.float32) / 255
    normalised = (pixels - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return normalised.transpose(2, 0, 1).astype(np.float32)
