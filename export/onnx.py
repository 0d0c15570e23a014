"""STIV to ONNX: one file that takes any batch, frames, height, width and text length, and says what it was made from.

It owns which parts of the network are low, the file's names and its metadata; it knows nothing of runtimes or of
whether the graph is right (`parity` proves that).

Blocks differ only in their weights, so one is traced and then repeated: the time does not grow with the depth.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from export.guidance import GUIDED_PREFIX, GuidedNetwork
from export.profiles import TYPES, Shape, ShapeProfile
from export.tracing import DTYPES, EXTERNAL_ABOVE, file_digest, label, save, trace, weights_digest
from model.config import Precision
from model.network.stiv import STIV
from model.recipe import StageRecipe, dumps

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

INPUTS = ("latents", "timestep", "text", "text_mask", "pooled", "micro")
OUTPUT = "velocity"
UNUSED = ("mask_token",)
"""Weights of training alone."""
LOW_PARTS = ("blocks.", "text_projection.")
"""Where linear layers may be low: what is applied to every token in every block. The two ends of the network and the
condition stay float32: hardly any arithmetic, and their rounding would reach every token or the velocity itself."""


@dataclass(slots=True, frozen=True)
class OnnxExport:
    """What was written."""

    path: Path
    sha256: str
    """Of the file at `path`; the weights beside it, if any, are named by `metadata`."""
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
    precision: Precision | None = None,
    external_above: int = EXTERNAL_ABOVE,
) -> OnnxExport:
    """Write `network`, which `recipe` trained, to `path`; weights too large for it go to `path`.data.

    Args:
        precision: of the graph, the recipe's own unless given. Inputs and velocity are float32 in any.
    """
    from export import graph
    from export.precision import lower, tensor

    start = time.perf_counter()
    if network.config != recipe.network:
        raise ValueError(f"the network is {network.config}, the recipe '{recipe.name}' says {recipe.network}")
    profile, precision = profile or ShapeProfile.of(recipe, network), precision or recipe.export.precision
    trained, weights = graph_weights(network), graph_weights(network, precision)
    model = _trace(_one_block(network, trained), profile)
    graph.tidy(model, weights.keys())
    velocity, entering, leaving = model.graph.outputs
    model.graph.outputs[:] = [velocity]
    graph.repeat_block(model.graph, graph.BlockEnds(entering, leaving), network.config.depth)
    lower(model.graph, precision, [name for name, weight in weights.items() if weight.dtype != torch.float32])
    graph.fill(model.graph, {name: tensor(name, weight) for name, weight in weights.items()})
    missing = weights.keys() - model.graph.initializers.keys() - set(UNUSED)
    assert not missing, f"weights that the graph does not hold: {sorted(missing)}"

    metadata = _metadata(recipe, trained, profile, precision)
    inputs = profile.signature()
    label(model, recipe.name, metadata, inputs, {OUTPUT: inputs["latents"]})
    size = save(model, path, external_above)
    seconds = time.perf_counter() - start
    logger.info("exported %s to %s in %s: %.1f MB in %.1f s", recipe.name, path, precision, size / 1e6, seconds)
    return OnnxExport(path, file_digest(path), size, seconds, profile, metadata)


def graph_weights(network: STIV, precision: Precision = "fp32") -> dict[str, Tensor]:
    """The network's weights on the CPU, by the names, types and layouts that its graph holds them in."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in network.state_dict().items()}
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(
                f"weight '{name}' is {weight.dtype}; a graph is made from float32 weights, whatever its own precision,"
                " so export network.float()"
            )
    modules = cast(Iterable[tuple[str, nn.Module]], network.named_modules())
    for layer, module in modules:
        if isinstance(module, nn.Linear) and layer.startswith(LOW_PARTS):
            for name in (f"{layer}.weight", f"{layer}.bias"):
                weights[name] = weights[name].to(DTYPES[precision])
    return weights


def recipe_digest(recipe: StageRecipe) -> str:
    return hashlib.sha256(dumps(recipe).encode()).hexdigest()


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
    ends: list[Tensor] = []

    def note_ends(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ends[:] = [inputs[0], output]

    def add_ends(_: nn.Module, __: object, velocity: Tensor) -> tuple[Tensor, ...]:
        return (velocity, *ends)

    shallow.blocks[0].register_forward_hook(note_ends)
    module: nn.Module = GuidedNetwork(shallow) if profile.guided else shallow
    module.register_forward_hook(add_ends)
    frame, side = profile.frame_multiple, profile.side_multiple
    odd = Shape(batch=2, frames=3 * frame, height=4 * side, width=7 * side, text_tokens=5)
    example = {
        name: torch.zeros(size, dtype=TYPES.get(name, torch.float32))
        for name, size in profile.input_shapes(odd).items()
    }
    multiples = {"frames": frame, "height": side, "width": side}
    model = trace(module, example, profile.signature(), outputs=[OUTPUT], multiples=multiples)
    for value in list(model.graph.initializers.values()):  # a weight keeps the name it has in the network itself
        value.name = str(value.name).removeprefix(GUIDED_PREFIX)
    return model


def _metadata(
    recipe: StageRecipe, weights: Mapping[str, Tensor], profile: ShapeProfile, precision: Precision
) -> dict[str, str]:
    return {
        "stiv.stage": recipe.name,
        "stiv.recipe_sha256": recipe_digest(recipe),
        "stiv.weights_sha256": weights_digest(weights),
        "stiv.profile": profile.model_dump_json(),
        "stiv.precision": precision,
        "stiv.guidance": "inside" if profile.guided else "outside",
    }
