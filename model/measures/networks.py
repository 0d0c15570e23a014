"""Networks given as files: an ONNX file with a card beside it becomes a feature extractor or a perceptual distance.

It owns the card (what the file measures and what it wants to see) and how clips are fed to it. ONNX because reading it
runs no code; I3D, C3D, Inception or LPIPS are exported once, by whoever has their weights.
"""

import hashlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn import functional

from model.config import Config, Positive
from model.measures.motion import Frames

Channels = tuple[float, float, float]


class NetworkCard(Config):
    """`NAME.json` beside `NAME.onnx`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Names the figures: `TASK_MEASURE_NAME`."""
    measure: Literal["fvd", "fid", "inception_score", "lpips"]
    """`fvd`: a clip -> features; `fid`: a frame -> features; `inception_score`: a clip -> logits of classes; `lpips`:
    two frames -> their distance."""
    layout: Literal["BCTHW", "BTCHW", "BCHW"]
    """Axes of the input; frames (`fid`, `lpips`) are BCHW."""
    size: tuple[Positive, Positive]
    """Height and width that pictures are scaled to."""
    antialias: bool = False
    """Blur before pictures are made smaller; off is the plain bilinear of the published FVD code."""
    num_frames: Positive | None = None
    """Frames of a clip; None takes clips of any length, otherwise the middle of longer ones is taken."""
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)
    """Pixels in [0, 1] become (pixel - mean) / std; the default gives [-1, 1]."""
    splits: Positive = 10
    """Parts that the Inception Score is averaged over."""
    source: str
    """Whose weights these are and how they were exported."""

    @property
    def takes_clips(self) -> bool:
        return self.measure in ("fvd", "inception_score")


class OnnxNetwork:
    """An exported network on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.card = _read_card(path.with_suffix(".json"))
        if self.card.takes_clips == (self.card.layout == "BCHW"):
            raise ValueError(
                f"{path.with_suffix('.json')}: measure '{self.card.measure}' does not go with layout"
                f" '{self.card.layout}'; clips are BCTHW or BTCHW, frames BCHW"
            )
        self.sha256 = _digest(path)
        self._session = _open_session(path)
        self._inputs = [cast(str, each.name) for each in self._session.get_inputs()]
        wanted = 2 if self.card.measure == "lpips" else 1
        if len(self._inputs) != wanted:
            raise ValueError(f"{path} has inputs {self._inputs}; measure '{self.card.measure}' gives {wanted}")

    @property
    def name(self) -> str:
        return self.card.name

    def __call__(self, clips: Sequence[Frames]) -> Tensor:
        """Features [N, D] of N clips [T, H, W, 3]; of every frame of theirs where the network takes frames."""
        return torch.cat([self._run(self._prepared(clip)) for clip in clips])

    def distance(self, frames_a: Frames, frames_b: Frames) -> Tensor:
        """Distance [T] of each frame of two clips."""
        return self._run(self._prepared(frames_a), self._prepared(frames_b)).reshape(len(frames_a))

    def _prepared(self, clip: Frames) -> Tensor:
        """The clip as one row, or its frames as rows."""
        card = self.card
        if card.num_frames is not None:
            if len(clip) < card.num_frames:
                raise ValueError(f"'{card.name}' takes {card.num_frames} frames, the clips have {len(clip)}")
            first = (len(clip) - card.num_frames) // 2
            clip = clip[first : first + card.num_frames]
        pixels = torch.as_tensor(clip.astype(np.float32)).permute(0, 3, 1, 2)
        pixels = functional.interpolate(
            pixels, size=card.size, mode="bilinear", align_corners=False, antialias=card.antialias
        )
        pixels = (pixels / 255 - torch.tensor(card.mean).view(3, 1, 1)) / torch.tensor(card.std).view(3, 1, 1)
        if card.layout == "BCHW":
            return pixels
        return pixels[None] if card.layout == "BTCHW" else pixels.transpose(0, 1)[None]

    def _run(self, *inputs: Tensor) -> Tensor:
        feeds = {name: value.contiguous().numpy() for name, value in zip(self._inputs, inputs, strict=True)}
        output = self._session.run(None, feeds)[0]
        return torch.as_tensor(output, dtype=torch.float32).reshape(inputs[0].shape[0], -1)


def _read_card(path: Path) -> NetworkCard:
    try:
        return NetworkCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: write what the network beside it measures, such as"
            ' {"name": "i3d", "measure": "fvd", "layout": "BCTHW", "size": [224, 224], "source": "…"}'
        ) from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path} is not a card of a network: {problems}") from None


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; export the network to it") from None


def _open_session(path: Path) -> Any:
    """An `onnxruntime.InferenceSession`, which has no types; from bytes, so that it cannot reach for other files."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    runtime = cast(Any, onnxruntime)
    states = cast(Any, import_module("onnxruntime.capi.onnxruntime_pybind11_state"))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except (states.Fail, states.InvalidProtobuf, states.InvalidGraph, states.RuntimeException) as error:
        raise ValueError(f"{path} cannot be loaded as one self-contained ONNX file: {error}") from None
