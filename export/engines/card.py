"""The card of an engine: what it was built from, by what, for what; and whether it runs here.

It owns `engine.json` of a bundle and every check that comes before a byte of the engine is loaded; it knows nothing of
how it is loaded.
"""

import hashlib
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, ValidationError

from export.engines.protocol import EngineCorrupt, EngineMismatch
from export.engines.targets import DEFAULT, AnyTarget, OnnxTarget, Target, TensorRtTarget, TorchTarget
from export.engines.weights import metadata, read_graph
from export.tensorrt import library
from export.tensorrt.library import RTX
from model.config import Config, Precision, Quantization

CARD = "engine.json"
PLAN = "engine.plan"
LOG = "builder.log"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RTX_DEFAULT = ("sm80", "sm86", "sm89")
"""What `tensorrt_rtx` builds for unless told, besides 12.0 and later."""


class EngineCard(Config):
    """What `engine.json` says."""

    target: Target
    precision: Precision
    """Of the graph."""
    quantization: Quantization = "none"
    """Of the linear layers in it."""
    builder: str
    """Library that made, or runs, the engine: torch, onnxruntime, tensorrt, tensorrt_rtx."""
    version: str
    """Of the builder."""
    architectures: tuple[str, ...]
    """GPUs a plan was built for, as `sm89`; empty where it does not matter."""
    onnx_sha256: Sha256
    weights_sha256: Sha256
    recipe_sha256: Sha256

    @property
    def coarsest(self) -> str:
        """What bounds its errors, see `parity.report.BOUNDS`."""
        return self.precision if self.quantization == "none" else self.quantization


def describe(model: Path, target: AnyTarget = DEFAULT, *, architectures: tuple[str, ...] = ()) -> EngineCard:
    """The card of an engine made here for `target` from the exported file `model`."""
    said = metadata(read_graph(model))
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    builder, version = builder_here(target)
    return EngineCard.model_validate(
        {
            "target": target,
            "precision": said["stiv.precision"],
            "quantization": said.get("stiv.quantization", "none"),
            "builder": builder,
            "version": version,
            "architectures": architectures,
            "onnx_sha256": digest,
            "weights_sha256": said["stiv.weights_sha256"],
            "recipe_sha256": said["stiv.recipe_sha256"],
        }
    )


def builder_here(target: AnyTarget) -> tuple[str, str]:
    """The library that makes or runs an engine for `target`, and its version on this machine."""
    if isinstance(target, TensorRtTarget):
        return target.runtime, library.version(target.runtime)
    return (
        ("torch", torch.__version__) if isinstance(target, TorchTarget) else ("onnxruntime", installed("onnxruntime"))
    )


def architecture_here(target: AnyTarget) -> str | None:
    """Of the GPU that a plan for `target` runs on, None if this machine has none."""
    gpu = target.gpu if isinstance(target, TensorRtTarget) else 0
    return library.architecture(gpu) if library.has_driver() else None


def read_card(path: Path) -> EngineCard:
    try:
        return EngineCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise EngineCorrupt(f"{path} is missing; export the checkpoint again") from None
    except ValidationError as error:
        raise EngineCorrupt(f"{path} cannot be read, export the checkpoint again: {error}") from None


def require_runs_here(card: EngineCard, *, version: str, architecture: str | None) -> None:
    """Refuse a plan of another version or for other GPUs, and say what to build.

    Args:
        version: of the card's builder on this machine.
        architecture: of the GPU it is to run on, None if there is none.
    """
    if isinstance(card.target, OnnxTarget | TorchTarget):
        return  # a graph and weights are bound to no version
    _require_version(card, card.target, version)
    if architecture is None:
        raise EngineMismatch(
            f"the engine is a plan of {card.builder} for {list(card.architectures)} and this machine has no CUDA driver"
            " that finds a GPU; serve it there, or export for target 'cpu'"
        )
    if not _covers(card, card.target, architecture):
        raise EngineMismatch(
            f"the engine was built for {_built_for(card)}, this GPU is {architecture};"
            + (
                f" {RTX} supports no {architecture}, so export for target 'torch' or 'tensorrt'"
                if card.target.runtime == RTX and architecture in ("sm90", "sm100", "sm103")
                else f" export again with build.architectures that hold it, or on this machine ({card.builder})"
            )
        )


def _require_version(card: EngineCard, target: TensorRtTarget, version: str) -> None:
    if card.version == version:
        return
    built, here = (tuple(int(part) for part in each.split(".")) for each in (card.version, version))
    if target.build.version_compatible and built[0] == here[0] and built <= here:
        return
    raise EngineMismatch(
        f"the engine was built by {card.builder} {card.version}, here is {version}; export it again with {version}, or"
        f" install {card.version}"
    )


def _covers(card: EngineCard, target: TensorRtTarget, architecture: str) -> bool:
    capability = int(architecture.removeprefix("sm"))
    if target.runtime == RTX:
        if card.architectures:
            return architecture in card.architectures
        return architecture in RTX_DEFAULT or capability >= 120
    if target.build.hardware_compatible == "ampere_plus":
        return capability >= 80
    return architecture in card.architectures


def _built_for(card: EngineCard) -> str:
    return str(list(card.architectures)) if card.architectures else f"{[*RTX_DEFAULT, 'sm120 and later']}"
