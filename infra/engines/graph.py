"""The exported graph of a checkpoint: traced, or taken from an engine that holds the same one.

It owns what a graph is made from and when it is reused; how it is written is `export.onnx`'s.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from export.bundle import MODEL
from export.onnx import export_onnx, graph_weights, recipe_digest
from export.parity.inputs import ParityInputs
from export.profiles import ShapeProfile
from export.tracing import weights_digest
from infra.engines.index import EngineIndex
from infra.engines.inputs import GraphInputs, is_known, spelt
from infra.registry.registry import Registry
from model.network.stiv import STIV
from model.recipe import StageRecipe
from monitoring import metrics as measured

logger = logging.getLogger(__name__)

EXPORTERS = ("torch", "onnx", "onnx-ir", "onnxscript")
"""Whatever of these changes may write another file."""


@dataclass(slots=True, frozen=True)
class Graph:
    """An exported file in a folder of this machine."""

    model: Path
    profile: ShapeProfile
    inputs: GraphInputs
    seconds: float
    """Of the export; 0 where the file was stored already."""


Calibration = Callable[[ShapeProfile], ParityInputs]
"""What the layers of a quantised graph are calibrated on."""


def export_graph(registry: Registry, network: STIV, recipe: StageRecipe, work: Path, calibration: Calibration) -> Graph:
    """The graph of `network`, below `work`, quantised if the recipe says so."""
    profile, inputs = ShapeProfile.of(recipe, network), graph_inputs(registry, network, recipe)
    stored = EngineIndex(registry).find(inputs.digest) if is_known(registry.code) else None
    if stored is not None:
        folder = registry.fetch(stored, work / "inputs" / stored.digest[:16])
        logger.info("the graph of '%s' is that of engine %s: not traced again", recipe.name, stored.digest[:16])
        return Graph(folder / MODEL, profile, inputs, seconds=0.0)
    (work / "onnx").mkdir(parents=True, exist_ok=True)
    exported = export_onnx(network, work / "onnx" / MODEL, recipe=recipe, profile=profile)
    measured.EXPORT_SECONDS.observe(exported.seconds)
    if recipe.export.quantization != "none":
        from export.quantize import calibrate, quantize_file  # brings the exporter in

        scales = calibrate(network, calibration(profile), recipe.export.quantization)
        quantize_file(exported.path, exported.path, recipe.export.quantization, scales)
    return Graph(exported.path, profile, inputs, exported.seconds)


def graph_inputs(registry: Registry, network: STIV, recipe: StageRecipe) -> GraphInputs:
    return GraphInputs(
        recipe_sha256=recipe_digest(recipe),
        weights_sha256=weights_digest(graph_weights(network)),
        precision=recipe.export.precision,
        profile=ShapeProfile.of(recipe, network),
        code=spelt(registry.code),
        exporter={name: version(name) for name in EXPORTERS},
    )
