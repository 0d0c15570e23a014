"""From a recipe and folders to a stage ready for its next step: built, grown from its parent, or resumed.

It owns what may differ between a run and its resumption; it knows nothing of steps.
"""

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

import torch

from model.checkpoint import folder as checkpoint
from model.checkpoint.reader import Reader
from model.checkpoint.sink import CheckpointSink, restore
from model.checkpoint.writer import CheckpointWriter
from model.config import RESUMABLE
from model.data.latents import require_fit
from model.data.loader import ClipLoader
from model.data.shards import INDEX, ShardSet
from model.network.recompute import compile_blocks, recompute_blocks
from model.network.sequence import SequenceGroup
from model.network.stiv import STIV
from model.optim.choice import make_optimizer
from model.optim.ema import Ema
from model.recipe import StageRecipe
from model.training.captions import CaptionTable, captions_of
from model.training.grow import grow
from model.training.parallel import COLLECTIVE_TIMEOUT, ParallelEngine, Place, meet, parameter_groups
from model.training.run import RunFolders
from model.training.stage import StageTraining
from model.vae import HEADER, load_codec

logger = logging.getLogger(__name__)


def prepare(
    recipe: StageRecipe, folders: RunFolders, place: Place, sink: CheckpointSink | None = None
) -> StageTraining:
    """Everything built and, where the run has a checkpoint, put back to where it was."""
    training = recipe.training
    shards = ShardSet(folders.data / "train")
    require_fit(shards, recipe, folders.codec)
    loader = ClipLoader(
        shards,
        video=recipe.video,
        data=recipe.data,
        micro_batch_size=training.micro_batch_size,
        rank=place.rank // training.sequence_parallel,
        world_size=training.data_parallel,
        seed=training.seed,
        task=recipe.task,
        mix=recipe.conditioning.mix,
        temporal_patch_size=recipe.network.temporal_patch_size,
        buckets=recipe.data.buckets,
        accumulation=training.gradient_accumulation_steps,
        workers=recipe.data.workers,
    )
    texts = captions_of(shards, stills=recipe.trains_on_stills)
    captions = CaptionTable.kept(folders.captions, texts, recipe.text, place)
    torch.manual_seed(training.seed)  # pyright: ignore[reportUnknownMemberType]
    network = STIV(
        recipe.network,
        latent_channels=recipe.vae.latent_channels,
        text_size=captions.embeddings.tokens.shape[-1],
        pooled_size=captions.embeddings.pooled.shape[-1],
    ).to(place.device)
    inputs = digests_of(folders)
    if sink is not None:
        if place.is_first:
            restore(folders.checkpoints, sink)
        meet()
    saved = latest_of(recipe, folders, inputs)
    if saved is None:
        begin(network, recipe, folders.initial, folders.initial_temporal)
    else:
        _fill(network, saved)
    _spread(network, recipe)
    optimizer = make_optimizer(parameter_groups(network), recipe.optimizer)
    engine = ParallelEngine(network, optimizer, training, place)
    ema = Ema(engine.masters, training.ema_decay)
    if saved is not None:
        optimizer.load_state(partial(saved.read, "optimizer"), saved.step)
        ema.load(partial(saved.read, "ema"))
        loader.load_state_dict(saved.loader)
        checkpoint.restore_random(saved.random(place.rank))
        logger.info("resumed after step %s", saved.step)
    return StageTraining(
        recipe=recipe,
        folders=folders,
        engine=engine,
        optimizer=optimizer,
        ema=ema,
        loader=loader,
        codec=load_codec(folders.codec, recipe.vae).to(place.device),
        captions=captions,
        writer=CheckpointWriter(
            folders.checkpoints, keep=training.keep_checkpoints, rank=place.rank, world_size=place.world_size, sink=sink
        ),
        inputs=inputs,
        step=0 if saved is None else saved.step,
    )


def digests_of(folders: RunFolders) -> dict[str, str]:
    """What a run is started from, by content: wherever the folders lie, and whatever is copied over them later."""
    found = {"data": folders.data / "train" / INDEX, "codec": folders.codec / HEADER}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if path.exists()}
    grown_from = {"initial": folders.initial, "initial_temporal": folders.initial_temporal}
    return digests | {name: checkpoint.digest_of(path) for name, path in grown_from.items() if path is not None}


def latest_of(recipe: StageRecipe, folders: RunFolders, inputs: Mapping[str, str]) -> Reader | None:
    """The run's latest checkpoint, if it is of this recipe and these inputs."""
    folder = checkpoint.latest(folders.checkpoints)
    if folder is None:
        return None
    saved = Reader(folder)
    here, there = {**_identity(recipe), **inputs}, {**_identity(saved.recipe), **saved.inputs}
    changed = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    if changed:
        raise ValueError(
            f"{folder} was trained otherwise: {changed[0]} was {there.get(changed[0])} and is {here.get(changed[0])}"
            f" ({len(changed)} differences); use a new run folder, or what it began with"
        )
    return saved


def _spread(network: STIV, recipe: StageRecipe) -> None:
    """Have the network's blocks run as the recipe says: by several ranks, with less kept, compiled."""
    training = recipe.training
    if training.sequence_parallel > 1:
        network.share_clips(SequenceGroup.join(training.sequence_parallel, COLLECTIVE_TIMEOUT))
    if training.activation_checkpointing:
        recompute_blocks(network)
    if training.compile:
        compile_blocks(network)


@torch.no_grad()
def _fill(network: STIV, saved: Reader) -> None:
    """Put the masters back; parameter by parameter, so that no second copy of all of them is needed."""
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    saved.require("model", shapes)
    saved.require("ema", shapes)
    for name, parameter in network.named_parameters():
        parameter.copy_(saved.read("model", name).view(parameter.shape))


def _identity(recipe: StageRecipe) -> dict[str, object]:
    """What decides the weights, by dotted key."""
    sections = recipe.model_dump(mode="json", exclude={"sampling", "evaluation", "gate"})
    flat: dict[str, object] = {}
    for name, section in sections.items():
        if isinstance(section, dict):
            flat |= {f"{name}.{key}": value for key, value in cast(dict[str, object], section).items()}
        else:
            flat[name] = section
    free = {f"training.{field}" for field in RESUMABLE} | {"data.workers", "data.max_corrupt"}
    if recipe.data.buckets:
        free.discard("training.micro_batch_size")  # it decides how many clips of a bucket a step holds
    return {key: value for key, value in flat.items() if key not in free}


def begin(network: STIV, recipe: StageRecipe, initial: Path | None, initial_temporal: Path | None = None) -> None:
    """Fill a new network from the EMA weights of the stage's parents; a stage without a parent keeps its own."""
    for role, parent, folder in (
        ("parent", recipe.parent, initial),
        ("temporal parent", recipe.temporal_parent, initial_temporal),
    ):
        if (parent is None) != (folder is None):
            raise ValueError(
                f"stage '{recipe.name}' has {role} {parent!r}, but its initial checkpoint is {folder}; give the"
                f" {role}'s checkpoint folder to a stage that has a {role}, and none to one that has not"
            )
    if initial is not None:
        temporal = None if initial_temporal is None else checkpoint.load_weights(initial_temporal, "ema")
        report = grow(network, checkpoint.load_weights(initial, "ema"), temporal)
        logger.info(
            "grown: %s weights copied, %s inflated, %s new",
            len(report.copied),
            len(report.inflated),
            len(report.new),
        )
