"""Engines: what evaluates the velocity network, behind one call.

It owns where the arithmetic runs and what is checked before it does; it knows nothing of guidance, solvers or requests.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from export.onnx import INPUTS, OUTPUT
from export.profiles import Shape, ShapeProfile
from model.conditioning import Conditions
from model.network.stiv import STIV

CPU = "CPUExecutionProvider"


class EngineCorrupt(Exception):
    """A file of an engine is missing, or is not what was written."""


class EngineMismatch(Exception):
    """An engine that is whole, but not the one for this recipe, runtime or version."""


class Engine(Protocol):
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [B, T, C, H, W] of latents [B, T, C, H, W] at flow times [B]; float32 in and out."""
        ...


class TorchEngine:
    """The network itself, without gradients, on the device its weights are on."""

    def __init__(self, network: STIV) -> None:
        self.network = network.eval()

    @torch.no_grad()
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        device = self.network.patch_embedding.weight.device
        given = conditions.to(device)
        velocity = self.network(
            latents.to(device), timestep.to(device), given.text, given.text_mask, given.pooled, given.micro
        )
        return cast(Tensor, velocity).to(latents.device)


class OnnxEngine:
    """An exported file on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        """`threads` for one operator; as many as PyTorch uses unless said."""
        self.path = path
        self._session = _open_session(path, threads or torch.get_num_threads())
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        if "stiv.profile" not in self.metadata:
            raise EngineMismatch(f"{path} says no stiv.profile: it was not written by export_onnx; export it again")
        self.profile = ShapeProfile.model_validate_json(self.metadata["stiv.profile"])
        names = tuple(each.name for each in self._session.get_inputs())
        if names != INPUTS:
            raise EngineMismatch(f"{path} takes {names}, this version gives {INPUTS}; export it again")

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        values = (latents, timestep, conditions.text, conditions.text_mask, conditions.pooled, conditions.micro)
        given: dict[str, Tensor] = dict(zip(INPUTS, values, strict=True))
        self._require_fit(given)
        feeds = {name: value.detach().cpu().contiguous().numpy() for name, value in given.items()}
        (velocity,) = self._session.run([OUTPUT], feeds)
        return torch.as_tensor(velocity, device=latents.device)

    def _require_fit(self, given: Mapping[str, Tensor]) -> None:
        """Refuse what the file was never proven for, with a message better than the runtime's."""
        latents, text = given["latents"], given["text"]
        if latents.ndim != 5 or text.ndim != 3:
            raise ValueError(
                f"latents {tuple(latents.shape)} must be [B, T, C, H, W], text {tuple(text.shape)} [B, L, D]"
            )
        batch, frames, _, height, width = latents.shape
        shape = Shape(batch=batch, frames=frames, height=height, width=width, text_tokens=text.shape[1])
        self.profile.check(shape)
        for name, expected in self.profile.input_shapes(shape).items():
            if tuple(given[name].shape) != expected:
                raise ValueError(f"{name} has shape {tuple(given[name].shape)}, this engine takes {expected}")
            dtype = torch.bool if name == "text_mask" else torch.float32
            if given[name].dtype != dtype:
                raise ValueError(f"{name} is {given[name].dtype}, this engine takes {dtype}")
        if not bool(given["text_mask"].any(dim=1).all()):
            raise ValueError("a row of text_mask is all False; send at least the special tokens of the empty string")


def _open_session(path: Path, threads: int) -> Any:
    """An `onnxruntime.InferenceSession`, which has no types."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    if not path.is_file():
        raise ValueError(f"{path}: no such file; export a checkpoint to it")
    runtime = cast(Any, onnxruntime)
    states = cast(Any, import_module("onnxruntime.capi.onnxruntime_pybind11_state"))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        session = runtime.InferenceSession(path, options, providers=[CPU])
    except (states.Fail, states.InvalidProtobuf, states.InvalidGraph, states.RuntimeException) as error:
        raise EngineCorrupt(f"{path} cannot be loaded, export it again: {error}") from None
    if session.get_providers() != [CPU]:
        raise EngineMismatch(f"asked for {CPU}, ONNX Runtime chose {session.get_providers()}")
    return session
