"""A stage from its recipe to its promoted checkpoint: fetch, train, evaluate, publish, gate, promote.

It owns that order and the refs it reads and moves; how ranks run is the gang's, what they compute is the model's.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from infra.latents import require_current
from infra.launch.local import StageLaunch
from infra.launch.supervise import supervise
from infra.registry.gate import PromotionRefused
from infra.registry.layout import EVALUATION
from infra.registry.names import CODEC, DATASET, latents, promoted
from infra.registry.records import GateReport, Manifest, Ref
from infra.registry.registry import Registry
from model.checkpoint import folder as checkpoint
from model.recipe import StageRecipe, dumps
from model.training.run import ProgressLine, RunFolders, read_progress
from model.vae import WEIGHTS as CODEC_WEIGHTS
from monitoring import metrics as measured
from monitoring.goodput import Booked, booking, read

if TYPE_CHECKING:
    from model.training.evaluate import Evaluation

logger = logging.getLogger(__name__)

OnProgress = Callable[[Sequence[ProgressLine]], None]


class StageStopped(RuntimeError):
    """The gang was asked to stop; its checkpoint is saved, and running the stage again resumes it."""


@dataclass(slots=True, frozen=True)
class StageOutcome:
    """What a stage has come to."""

    checkpoint: Manifest
    gate: GateReport
    progress: tuple[ProgressLine, ...]
    grid: Path
    """Picture of the samples."""
    animations: dict[str, Path]
    """Task -> animated samples."""
    seconds: dict[str, float]
    """Part -> wall time."""
    booked: Booked | None = None
    """Where the stage's time went; None of a run that nobody booked."""


def run_stage(
    recipe: StageRecipe,
    registry: Registry,
    work: Path,
    *,
    who: str,
    on_progress: OnProgress,
    checkpoint_store: str | None = None,
) -> StageOutcome:
    """Train `recipe` from its parents' promoted checkpoints and promote what passes its gate.

    Below `work` lies all that is written; calling it again after an interruption resumes. With a `checkpoint_store`,
    which is no store of a registry, checkpoints are kept there too, and an empty `work` resumes from it.

    Raises:
        ArtifactNotFound: data set, codec or a parent has not been promoted yet.
        GangFailed: a rank ended in an error, or was lost again and again. StageStopped: this process was told to stop.
        RunBusy: another process runs the stage below `work`.
        PromotionRefused: the gate did not hold; the checkpoint is published, the ref is as it was.
    """
    seconds: dict[str, float] = {}
    clock = time.monotonic()
    folders, parents = fetch_inputs(recipe, registry, work)
    seconds["fetch"] = time.monotonic() - clock

    clock = time.monotonic()
    _train(StageLaunch(recipe, folders, checkpoint_store=checkpoint_store), on_progress)
    seconds["train"] = time.monotonic() - clock

    manifest, evaluation = publish_trained(recipe, registry, folders, parents, seconds)
    clock = time.monotonic()
    moved = promote_trained(recipe, registry, manifest.digest, who=who)
    seconds["promote"] = time.monotonic() - clock
    progress, booked = tuple(read_progress(folders.progress)), read(folders.goodput)
    animations = dict(evaluation.clips)
    return StageOutcome(manifest, moved.gate, progress, evaluation.grid, animations, seconds, booked)


def publish_trained(
    recipe: StageRecipe, registry: Registry, folders: RunFolders, parents: dict[str, str], seconds: dict[str, float]
) -> "tuple[Manifest, Evaluation]":
    """Evaluate a finished run's checkpoint and publish it; nothing is promoted. Adds to `seconds`."""
    clock = time.monotonic()
    trained = checkpoint.latest(folders.checkpoints)
    assert trained is not None, "a finished run has a checkpoint"
    with booking(folders.goodput, "evaluation"):
        evaluation = _evaluate(recipe, folders, trained)
    seconds["evaluate"] = time.monotonic() - clock

    clock = time.monotonic()
    files = {path.name: path for path in sorted(trained.iterdir())}
    files |= {EVALUATION + path.name: path for path in evaluation.files}
    manifest = registry.publish(
        "checkpoint",
        files,
        rules=recipe.gate,
        recipe=json.loads(dumps(recipe)),
        metrics=evaluation.metrics,
        parents=parents,
    )
    seconds["publish"] = time.monotonic() - clock
    return manifest, evaluation


def promote_trained(recipe: StageRecipe, registry: Registry, digest: str, *, who: str) -> Ref:
    """Move the stage's ref to a published checkpoint through its gate; PromotionRefused where that does not hold."""
    try:
        moved = registry.promote(promoted(recipe.name), digest, who=who, why=f"stage {recipe.name} trained")
    except PromotionRefused:
        measured.PROMOTIONS_TOTAL.labels(stage=recipe.name, outcome="refused").inc()
        raise
    measured.PROMOTIONS_TOTAL.labels(stage=recipe.name, outcome="promoted").inc()
    logger.info("promoted %s to %s", digest, promoted(recipe.name))
    return moved


_PARENTS = ("checkpoint", "temporal_checkpoint")


def resolve_inputs(recipe: StageRecipe, registry: Registry) -> dict[str, Manifest]:
    """Data set, codec and the parents' checkpoints by role, as their refs stand now.

    Raises ArtifactNotFound where one has not been promoted, and ValueError where they do not go together.
    """
    dataset, codec = registry.resolve(DATASET), registry.resolve(CODEC)
    if recipe.data.form == "latents":
        name = latents(recipe.video.height, recipe.video.width)
        encoded = registry.resolve(name)
        require_current(name, encoded, dataset, codec)
        dataset = encoded
    inputs = {"dataset": dataset, "codec": codec}
    for role, name in zip(_PARENTS, (recipe.parent, recipe.temporal_parent), strict=True):
        if name is not None:
            inputs[role] = registry.resolve(promoted(name))
            _require_same_codec(registry, name, inputs[role], codec)
    return inputs


def fetch_inputs(recipe: StageRecipe, registry: Registry, work: Path) -> tuple[RunFolders, dict[str, str]]:
    """Data set, codec and the parents' checkpoints as verified folders, and their digests by role."""
    inputs = resolve_inputs(recipe, registry)
    for manifest in inputs.values():
        registry.fetch(manifest, input_folder(work, manifest.digest))
    digests = {role: manifest.digest for role, manifest in inputs.items()}
    return folders_of(digests, work, work / recipe.name), digests


def input_folder(work: Path, digest: str) -> Path:
    return work / "inputs" / digest[:16]


def folders_of(inputs: Mapping[str, str], work: Path, run: Path) -> RunFolders:
    """Where fetched inputs lie below `work`, for a run in the folder `run`."""
    initial, temporal = (input_folder(work, inputs[role]) if role in inputs else None for role in _PARENTS)
    return RunFolders(
        data=input_folder(work, inputs["dataset"]),
        codec=input_folder(work, inputs["codec"]),
        run=run,
        initial=initial,
        initial_temporal=temporal,
    )


def _require_same_codec(registry: Registry, name: str, parent: Manifest, codec: Manifest) -> None:
    """Weights learnt on one codec's latents mean nothing on another's, whatever their shapes."""
    theirs = registry.manifest(parent.parents["codec"])
    if theirs.files[CODEC_WEIGHTS] != codec.files[CODEC_WEIGHTS]:
        raise ValueError(
            f"'{promoted(name)}' was trained on codec {theirs.digest[:16]}, and '{CODEC}' is {codec.digest[:16]} with"
            f" other weights; promote the former to '{CODEC}', or train '{name}' anew"
        )


def _train(launch: StageLaunch, on_progress: OnProgress) -> None:
    folders = launch.folders
    status = supervise(launch, on_poll=lambda: on_progress(read_progress(folders.progress)))
    on_progress(read_progress(folders.progress))
    if status == "stopped":
        raise StageStopped(f"the ranks in {folders.run} were stopped after a checkpoint; run the stage again to resume")


def _evaluate(recipe: StageRecipe, folders: RunFolders, trained: Path) -> "Evaluation":
    """The checkpoint as a later stage or an export will see it: read back from its files, digests verified."""
    from model.data.shards import ShardSet
    from model.training.evaluate import evaluate, load_network, make_generator

    network = load_network(recipe, trained)
    generator = make_generator(recipe, network, folders.codec)
    evaluation = evaluate(generator, ShardSet(folders.data / "heldout"), folders.run / "evaluation")
    facts = {"checkpoint_loads": 1.0, "parameters": float(sum(p.numel() for p in network.parameters()))}
    return replace(evaluation, metrics={**facts, **evaluation.metrics})
