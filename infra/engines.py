"""From a promoted checkpoint to a published engine: export, prove parity, publish, promote.

It owns that order and the refs of engines; how a network becomes a file and how it is proven is `export`'s.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from export.bundle import MODEL, PICTURE, write_bundle
from export.engines.onnx_runtime import OnnxEngine
from export.engines.torch import TorchEngine
from export.onnx import export_onnx
from export.parity.check import check_parity
from export.parity.inputs import ParityInputs
from export.parity.report import ParityReport
from infra.registry.names import CANDIDATE
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.trained import fetch_trained
from model.config import GateRule
from model.recipe import StageRecipe, dumps
from model.text import load_text_encoder
from monitoring import metrics as measured

logger = logging.getLogger(__name__)

SERVED_TASKS = frozenset({"t2i", "t2v", "ti2v"})
"""What a request can ask for: text, or text and a first frame."""
PARITY_GATE = (GateRule(metric="parity_error_over_bound", op="<=", bound=1.0),)


@dataclass(slots=True, frozen=True)
class ExportedEngine:
    """A published engine and its proof."""

    manifest: Manifest
    parity: ParityReport
    export_seconds: float


def export_engine(registry: Registry, ref: str, work: Path, *, who: str) -> ExportedEngine:
    """Export the checkpoint at `ref` to ONNX, compare it with PyTorch, publish it and move `engine/candidate`.

    Raises:
        ArtifactNotFound: no such ref. ParityFailed: the engine is wrong; nothing is published.
    """
    trained = fetch_trained(registry, ref, work)
    recipe = trained.recipe
    require_served(recipe)
    network = trained.network()

    bundle_folder = work / "engine"
    shutil.rmtree(bundle_folder, ignore_errors=True)
    (work / "onnx").mkdir(parents=True, exist_ok=True)
    exported = export_onnx(network, work / "onnx" / MODEL, recipe=recipe)
    measured.EXPORT_SECONDS.observe(exported.seconds)
    codec, picture = trained.codec(), work / "onnx" / PICTURE
    parity = check_parity(
        TorchEngine(network),
        OnnxEngine(exported.path),
        ParityInputs(exported.profile, recipe, codec, load_text_encoder(recipe.text)),
        subject=exported.sha256,
        precision=recipe.export.precision,
        picture=picture,
    )
    measured.PARITY_MAX_ABS_ERROR.set(parity.worst_call.max_abs_error)
    bundle = write_bundle(
        bundle_folder, model=exported.path, codec=codec, recipe=recipe, parity=parity, extra={PICTURE: picture}
    )
    figures = {**parity.metrics, "export_seconds": exported.seconds}
    manifest = registry.publish(
        "engine",
        bundle.files,
        recipe=json.loads(dumps(recipe)),
        metrics=figures,
        rules=PARITY_GATE,
        parents={"checkpoint": trained.manifest.digest, "codec": trained.codec_manifest.digest},
    )
    registry.promote(CANDIDATE, manifest.digest, who=who, why=f"exported from {ref}")
    logger.info("promoted %s to %s", manifest.digest, CANDIDATE)
    return ExportedEngine(manifest, parity, exported.seconds)


def require_served(recipe: StageRecipe) -> None:
    """Refuse a checkpoint that was trained for nothing that a server is asked for."""
    if SERVED_TASKS.isdisjoint(recipe.tasks):
        raise ValueError(
            f"stage '{recipe.name}' was trained for {sorted(recipe.tasks)}, a server draws {sorted(SERVED_TASKS)};"
            " use `stiv generate`, or train on a conditioning.mix with one of these"
        )
