"""The inputs of a call as an exported graph takes them, checked.

It owns which call an exported graph was proven for; it knows nothing of runtimes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from export.guidance import Combination
from export.profiles import TYPES, Shape, ShapeProfile
from model.conditioning import Conditions


def graph_inputs(
    profile: ShapeProfile,
    latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    combination: Combination | None = None,
) -> Mapping[str, Tensor]:
    """Every input by its name in the graph; what the graph was never proven for is refused, better than it would be.

    A graph with guidance inside gives every row its own velocity where there is no `combination`.
    """
    text = conditions.text
    if latents.ndim != 5 or text.ndim != 3:
        raise ValueError(f"latents {tuple(latents.shape)} must be [B, T, C, H, W], text {tuple(text.shape)} [B, L, D]")
    batch, frames, _, height, width = latents.shape
    shape = Shape(batch=batch, frames=frames, height=height, width=width, text_tokens=text.shape[1])
    profile.check(shape)
    given = _named(profile, latents, timestep, conditions, combination)
    for name, expected in profile.input_shapes(shape).items():
        if tuple(given[name].shape) != expected:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, this engine takes {expected}")
        dtype = TYPES.get(name, torch.float32)
        if given[name].dtype != dtype:
            raise ValueError(f"{name} is {given[name].dtype}, this engine takes {dtype}")
    if not bool(given["text_mask"].any(dim=1).all()):
        raise ValueError("a row of text_mask is all False; send at least the special tokens of the empty string")
    return given


def _named(
    profile: ShapeProfile,
    latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    combination: Combination | None,
) -> dict[str, Tensor]:
    given = {
        "latents": latents,
        "timestep": timestep,
        "text": conditions.text,
        "text_mask": conditions.text_mask,
        "pooled": conditions.pooled,
        "micro": conditions.micro,
    }
    if profile.takes_image:
        if conditions.image is None or conditions.image_given is None:
            raise ValueError("this engine attends to an image; give zeros and image_given False where there is none")
        given |= {"image": conditions.image, "image_given": conditions.image_given}
    if combination is not None and not profile.guided:
        raise ValueError("this engine has no guidance inside: combine its velocities outside, or export it anew")
    if profile.guided:
        used = combination or Combination.plain(latents.shape[0], latents.shape[1])
        given |= {"passes": used.passes, "scales": used.scales}
        given |= {"frame_mask": used.frame_mask, "renormalize": used.renormalize}
    return given
