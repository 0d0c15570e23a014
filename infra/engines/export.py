"""From a promoted checkpoint to a published engine: graph, build, proof, publication, promotion.

It owns that order and what is reused of it; how a network becomes a file and how it is proven is `export`'s.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from export.bundle import MODEL, MODEL_DATA, PARITY, PICTURE, RECIPE, write_bundle
from export.engines.card import CARD, EngineCard, architecture_here, builder_here, require_runs_here
from export.engines.opening import load_engine
from export.engines.protocol import Engine, EngineMismatch
from export.engines.targets import DEFAULT, AnyTarget, TensorRtTarget, TorchTarget
from export.engines.torch import TorchEngine
from export.parity.check import check_parity
from export.parity.inputs import ParityInputs
from export.parity.report import ParityReport
from export.profiles import ShapeProfile
from export.tensorrt.library import gpu_name
from export.tensorrt.listeners import OnProgress
from infra.engines.build import Built, build, card_of
from infra.engines.graph import Graph, export_graph
from infra.engines.index import EngineIndex
from infra.engines.inputs import EngineInputs, is_known
from infra.engines.parts import export_parts
from infra.engines.provenance import BuildRecord, statement
from infra.registry.names import CANDIDATE
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.serving.golden import TOLERANCE, write_golden
from infra.serving.pipeline import GOLDEN, VideoPipeline
from infra.trained import Trained, fetch_trained
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
    """A published engine."""

    manifest: Manifest
    parity: ParityReport | None
    """None of a plan for a GPU that this machine lacks: `prove_plan` proves it there, and no ref was moved."""
    reused: bool
    """It was stored already, made from the same inputs: nothing was built."""
    export_seconds: float
    """Of the trace; 0 where the graph was stored already."""

    @property
    def proof(self) -> ParityReport:
        """The report of an engine that must have one."""
        if self.parity is None:
            raise ValueError(
                f"engine {self.manifest.digest[:16]} is not proven: this machine cannot run it; `stiv engine verify` it"
                " on one that can"
            )
        return self.parity


@dataclass(slots=True, frozen=True)
class Draft:
    """An engine that is built and not yet published."""

    trained: Trained
    recipe: StageRecipe
    graph: Graph
    card: EngineCard
    built: Built
    started: datetime

    def unproven(self, work: Path) -> Mapping[str, Path]:
        """Files of an engine that cannot be called here; without a report it is no bundle, so no server takes it."""
        (work / CARD).write_text(self.card.model_dump_json(indent=2))
        (work / RECIPE).write_text(dumps(self.recipe))
        beside = self.graph.model.with_name(MODEL_DATA)
        files = {MODEL: self.graph.model, CARD: work / CARD, RECIPE: work / RECIPE, **self.built.files}
        return {**files, MODEL_DATA: beside} if beside.exists() else files


def export_engine(
    registry: Registry,
    ref: str,
    work: Path,
    *,
    who: str,
    target: AnyTarget = DEFAULT,
    on_progress: OnProgress | None = None,
) -> ExportedEngine:
    """Make an engine for `target` of the checkpoint at `ref`, prove it, publish it and move `engine/candidate`.

    What was made from the same inputs before is not made again.

    Raises:
        ArtifactNotFound: no such ref. ParityFailed: the engine is wrong; nothing is published.
    """
    started, why = datetime.now(UTC), f"exported from {ref}"
    trained = fetch_trained(registry, ref, work)
    recipe = recipe_for(trained.recipe, target)
    require_served(recipe)
    graph = export_graph(registry, trained.network(), recipe, work, partial(_real_inputs, trained, recipe))
    card = card_of(graph, target)
    inputs = EngineInputs.of(card, graph.profile, registry.code)
    stored = EngineIndex(registry).find(inputs.digest) if is_known(registry.code) else None
    if stored is not None:
        logger.info("engine %s was made from the same inputs: not built again", stored.digest[:16])
        return _promoted(registry, stored, who, why, reused=True, seconds=graph.seconds)
    built = build(registry.store, graph, recipe, target, work, on_progress)
    return publish_draft(registry, Draft(trained, recipe, graph, card, built, started), work, who=who, why=why)


def publish_draft(registry: Registry, draft: Draft, work: Path, *, who: str, why: str) -> ExportedEngine:
    """Prove a draft where this machine can run it, publish it, note its inputs and move `engine/candidate`."""
    target, graph = draft.card.target, draft.graph
    folder = work / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    figures = {**draft.built.figures, "export_seconds": graph.seconds}
    if runs_here(draft.card):
        files, parity = prove(draft, work, folder)
        figures |= parity.metrics
    else:
        files = draft.unproven(work)
    parents = {"checkpoint": draft.trained.manifest.digest, "codec": draft.trained.codec_manifest.digest}
    gpu = gpu_name(target.gpu) if isinstance(target, TensorRtTarget) else None
    inputs = EngineInputs.of(draft.card, graph.profile, registry.code)
    record = BuildRecord(graph.inputs, inputs, parents, draft.started, gpu, draft.built.timing_cache)
    made = registry.publish(
        "engine",
        files,
        recipe=json.loads(dumps(draft.recipe)),
        metrics=figures,
        rules=PARITY_GATE,
        parents=parents,
        provenance=statement(record, files),
    )
    if is_known(registry.code):
        made = EngineIndex(registry).remember(inputs.digest, made)
        EngineIndex(registry).remember(graph.inputs.digest, made)
    return _promoted(registry, made, who, why, reused=False, seconds=graph.seconds)


def prove(draft: Draft, work: Path, folder: Path) -> tuple[Mapping[str, Path], ParityReport]:
    """Compare the engine with the network, and bundle both engine and report in `folder`."""
    picture, golden = work / PICTURE, work / GOLDEN
    inputs = _real_inputs(draft.trained, draft.recipe, draft.graph.profile)
    staged = work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for name, path in draft.unproven(work).items():
        (staged / name).hardlink_to(path.absolute())
    engine: Engine = load_engine(staged, draft.card, draft.recipe)
    parity = check_parity(
        TorchEngine(draft.trained.network()),
        engine,
        inputs,
        subject=draft.card.onnx_sha256,
        precision=draft.card.coarsest,
        picture=picture,
    )
    measured.PARITY_MAX_ABS_ERROR.set(parity.worst_call.max_abs_error)
    assert inputs.codec is not None and inputs.text is not None
    pipeline = VideoPipeline(engine, inputs.codec, inputs.text, draft.recipe, profile=draft.graph.profile)
    write_golden(pipeline, golden, tolerance=max(TOLERANCE, parity.bounds.trajectory_error))
    bundle = write_bundle(
        folder,
        model=draft.graph.model,
        codec=inputs.codec,
        recipe=draft.recipe,
        parity=parity,
        card=draft.card,
        extra={PICTURE: picture, GOLDEN: golden, **draft.built.files, **export_parts(inputs, work)},
    )
    return bundle.files, parity


def _real_inputs(trained: Trained, recipe: StageRecipe, profile: ShapeProfile) -> ParityInputs:
    """Clips as the stage's codec encodes them, and their captions."""
    return ParityInputs(profile, recipe, trained.codec(), load_text_encoder(recipe.text))


def read_parity(registry: Registry, engine: Manifest) -> ParityReport | None:
    """The report an engine was published with, if it was proven."""
    if PARITY not in engine.files:
        return None
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / PARITY
        registry.store.fetch_file(engine.files[PARITY].digest, copy)
        return ParityReport.model_validate_json(copy.read_bytes())


def runs_here(card: EngineCard) -> bool:
    try:
        here = builder_here(card.target)[1]
        require_runs_here(card, version=here, architecture=architecture_here(card.target))
    except EngineMismatch as error:
        logger.warning("the engine is built and not proven: %s", error)
        return False
    return True


def recipe_for(recipe: StageRecipe, target: AnyTarget) -> StageRecipe:
    """The recipe in the precision that the target asks for; its own where it asks for none."""
    if isinstance(target, TorchTarget) and recipe.export.quantization != "none":
        raise ValueError(
            f"export.quantization '{recipe.export.quantization}' stands in the exported graph and target 'torch' runs"
            " the network itself; export for onnx_runtime or TensorRT, or set quantization 'none'"
        )
    if target.precision is None:
        return recipe
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"precision": target.precision})})


def require_served(recipe: StageRecipe) -> None:
    """Refuse a checkpoint that was trained for nothing that a server is asked for."""
    if SERVED_TASKS.isdisjoint(recipe.tasks):
        raise ValueError(
            f"stage '{recipe.name}' was trained for {sorted(recipe.tasks)}, a server draws {sorted(SERVED_TASKS)};"
            " use `stiv generate`, or train on a conditioning.mix with one of these"
        )


def _promoted(
    registry: Registry, engine: Manifest, who: str, why: str, *, reused: bool, seconds: float
) -> ExportedEngine:
    parity = read_parity(registry, engine)
    if parity is not None:
        registry.promote(CANDIDATE, engine.digest, who=who, why=why)
        logger.info("promoted %s to %s", engine.digest, CANDIDATE)
    return ExportedEngine(engine, parity, reused, seconds)
