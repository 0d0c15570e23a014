"""The inputs of a call as an exported graph takes them, checked.

It owns which call an exported graph was proven for; it knows nothing of runtimes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from export.onnx import INPUTS
from export.profiles import Shape, ShapeProfile
from model.conditioning import Conditions


def graph_inputs(
    profile: ShapeProfile, latents: Tensor, timestep: Tensor, conditions: Conditions
) -> Mapping[str, Tensor]:
    """Every input by its name in the graph; what the graph was never proven for is refused, better than it would be."""
    values = (latents, timestep, conditions.text, conditions.text_mask, conditions.pooled, conditions.micro)
    given: dict[str, Tensor] = dict(zip(INPUTS, values, strict=True))
    text = given["text"]
    if latents.ndim != 5 or text.ndim != 3:
        raise ValueError(f"latents {tuple(latents.shape)} must be [B, T, C, H, W], text {tuple(text.shape)} [B, L, D]")
    batch, frames, _, height, width = latents.shape
    shape = Shape(batch=batch, frames=frames, height=height, width=width, text_tokens=text.shape[1])
    profile.check(shape)
    for name, expected in profile.input_shapes(shape).items():
        if tuple(given[name].shape) != expected:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, this engine takes {expected}")
        dtype = torch.bool if name == "text_mask" else torch.float32
        if given[name].dtype != dtype:
            raise ValueError(f"{name} is {given[name].dtype}, this engine takes {dtype}")
    if not bool(given["text_mask"].any(dim=1).all()):
        raise ValueError("a row of text_mask is all False; send at least the special tokens of the empty string")
    return given
