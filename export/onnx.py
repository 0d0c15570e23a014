"""STIV to ONNX: one file that takes any batch, frames, height, width and text length, and says what it was made from.

It owns tracing, the file's names and its metadata; it knows nothing of runtimes or of whether the graph is right
(`parity` proves that).

Blocks differ only in their weights, so one is traced and then repeated: the time does not grow with the depth.
"""

import hashlib
import logging
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from export.profiles import ShapeProfile
from model.network.stiv import MICRO_GROUPS, STIV
from model.recipe import StageRecipe, dumps

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import Dim

logger = logging.getLogger(__name__)

OPSET = 20
"""Opset 23 would fuse attention, which ONNX Runtime's CPU provider then refuses."""
INPUTS = ("latents", "timestep", "text", "text_mask", "pooled", "micro")
OUTPUT = "velocity"
EXTERNAL_ABOVE = 2**31 - 2**24
"""Bytes of weights that still fit into the file itself: protobuf ends at 2 GiB."""
UNUSED = ("mask_token",)
"""Weights of training alone."""


@dataclass(slots=True, frozen=True)
class OnnxExport:
    """What was written."""

    path: Path
    sha256: str
    """Of the file at `path`; the weights beside it, if any, are named by `metadata`."""
    opset: int
    inputs: tuple[str, ...]
    bytes: int
    """Of all files."""
    seconds: float
    profile: ShapeProfile
    metadata: Mapping[str, str]


def export_onnx(
    network: STIV,
    path: Path,
    *,
    recipe: StageRecipe,
    profile: ShapeProfile | None = None,
    external_above: int = EXTERNAL_ABOVE,
) -> OnnxExport:
    """Write `network`, which `recipe` trained, to `path`; weights too large for it go to `path`.data."""
    import onnx_ir as ir

    from export import graph

    start = time.perf_counter()
    if network.config != recipe.network:
        raise ValueError(f"the network is {network.config}, the recipe '{recipe.name}' says {recipe.network}")
    if network.config.image_cross_attention != "off":
        raise ValueError(
            f"network.image_cross_attention '{network.config.image_cross_attention}' takes the image as an input of its"
            " own, and an engine has none; export a network with image_cross_attention 'off', which has the first frame"
            " among its latents"
        )
    profile = profile or ShapeProfile.of(recipe, network)
    weights = _weights(network)
    model = _trace(_one_block(network, weights), profile)
    graph.tidy(model, weights.keys())
    velocity, entering, leaving = model.graph.outputs
    model.graph.outputs[:] = [velocity]
    graph.repeat_block(model.graph, graph.BlockEnds(entering, leaving), network.config.depth)
    graph.fill(model.graph, {name: ir.tensor(weight.numpy(), name=name) for name, weight in weights.items()})
    missing = weights.keys() - model.graph.initializers.keys() - set(UNUSED)
    assert not missing, f"weights that the graph does not hold: {sorted(missing)}"

    metadata = _metadata(recipe, weights, profile)
    _label(model, metadata, profile)
    size = _save(model, path, external_above)
    seconds = time.perf_counter() - start
    logger.info("exported %s to %s: %.1f MB in %.1f s", recipe.name, path, size / 1e6, seconds)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return OnnxExport(path, digest, OPSET, INPUTS, size, seconds, profile, metadata)


def recipe_digest(recipe: StageRecipe) -> str:
    return hashlib.sha256(dumps(recipe).encode()).hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """One digest over names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].numpy()
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


def _weights(network: STIV) -> dict[str, Tensor]:
    weights = {name: weight.detach().cpu().contiguous() for name, weight in network.state_dict().items()}
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(f"weight '{name}' is {weight.dtype}; the graph is float32, so export network.float()")
    return weights


def _one_block(network: STIV, weights: Mapping[str, Tensor]) -> STIV:
    """The network as if its depth were 1, over the same memory."""
    with torch.device("meta"):
        shallow = STIV(
            network.config.model_copy(update={"depth": 1, "unmasked_depth": 0}),
            latent_channels=network.latent_channels,
            text_size=network.text_projection.hidden.in_features,
            pooled_size=network.pooled_projection.in_features,
        )
    shallow.load_state_dict({name: weights[name] for name in shallow.state_dict()}, assign=True)
    return shallow.eval().requires_grad_(False)


def _trace(shallow: STIV, profile: ShapeProfile) -> "ir.Model":
    """The graph of `shallow`, with two outputs more: what enters its block and what leaves it."""
    import torch.export
    import torch.onnx

    ends: list[Tensor] = []

    def note_ends(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ends[:] = [inputs[0], output]

    def add_ends(_: nn.Module, __: object, velocity: Tensor) -> tuple[Tensor, ...]:
        return (velocity, *ends)

    shallow.blocks[0].register_forward_hook(note_ends)
    shallow.register_forward_hook(add_ends)
    with _quiet():
        traced = torch.export.export(shallow, _example(profile), dynamic_shapes=_dynamic_shapes(profile))
        program = cast(Any, torch.onnx).export(
            traced,
            input_names=INPUTS,
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    return cast("ir.Model", program.model)


def _example(profile: ShapeProfile) -> tuple[Tensor, ...]:
    """Inputs to trace with: no size is 1 and no two are equal, or the tracer would take them for constants."""
    batch, tokens = 2, 5
    frames, height, width = 3 * profile.frame_multiple, 4 * profile.side_multiple, 7 * profile.side_multiple
    return (
        torch.zeros(batch, frames, profile.latent_channels, height, width),
        torch.zeros(batch),
        torch.zeros(batch, tokens, profile.text_size),
        torch.ones(batch, tokens, dtype=torch.bool),
        torch.zeros(batch, profile.pooled_size),
        torch.zeros(batch, sum(MICRO_GROUPS)),
    )


def _dynamic_shapes(profile: ShapeProfile) -> dict[str, dict[int, "Dim"]]:
    from torch.export import Dim

    def multiple(name: str, of: int) -> "Dim":
        return of * Dim(name, min=1) if of > 1 else Dim(name, min=1)

    batch, tokens = Dim("batch", min=1), Dim("text_tokens", min=1)
    sides = {3: multiple("rows", profile.side_multiple), 4: multiple("columns", profile.side_multiple)}
    return {
        "latents": {0: batch, 1: multiple("token_frames", profile.frame_multiple), **sides},
        "timestep": {0: batch},
        "text": {0: batch, 1: tokens},
        "text_mask": {0: batch, 1: tokens},
        "pooled": {0: batch},
        "micro": {0: batch},
    }


def _metadata(recipe: StageRecipe, weights: Mapping[str, Tensor], profile: ShapeProfile) -> dict[str, str]:
    return {
        "stiv.stage": recipe.name,
        "stiv.recipe_sha256": recipe_digest(recipe),
        "stiv.weights_sha256": weights_digest(weights),
        "stiv.profile": profile.model_dump_json(),
        "stiv.torch": torch.__version__,
    }


def _label(model: "ir.Model", metadata: Mapping[str, str], profile: ShapeProfile) -> None:
    """Give the file its metadata and its inputs readable sizes; sizes in between go, the tracer's names say nothing."""
    import onnx_ir as ir

    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.producer_name, model.producer_version = "stiv-platform", None
    model.graph.name = metadata["stiv.stage"]
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    sizes = _symbolic_shapes(profile)
    for value in model.graph.inputs:
        assert value.name is not None
        value.shape = ir.Shape(sizes[value.name])
    model.graph.outputs[0].name, model.graph.outputs[0].shape = OUTPUT, ir.Shape(sizes["latents"])


def _symbolic_shapes(profile: ShapeProfile) -> dict[str, list[int | str]]:
    return {
        "latents": ["batch", "frames", profile.latent_channels, "height", "width"],
        "timestep": ["batch"],
        "text": ["batch", "text_tokens", profile.text_size],
        "text_mask": ["batch", "text_tokens"],
        "pooled": ["batch", profile.pooled_size],
        "micro": ["batch", sum(MICRO_GROUPS)],
    }


def _save(model: "ir.Model", path: Path, external_above: int) -> int:
    """Bytes written; a graph above `external_above` keeps its weights in a second file, named in the first."""
    import onnx_ir as ir

    beside = path.with_name(path.name + ".data")
    beside.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    cast(Any, ir).save(model, path, external_data=beside.name if total > external_above else None)
    return sum(file.stat().st_size for file in (path, beside) if file.exists())


@contextmanager
def _quiet() -> Generator[None]:
    """Without the tracer's remarks on its own internals and on packages that nobody needs here."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
