"""Between a store and a diffusers-style folder: a checkpoint saved as one, and one published as a checkpoint.

It owns that order and what the published artifact says of its origin; the folder's layout is `model.pretrained`'s.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.registry.layout import EVALUATION
from infra.registry.names import CODEC, DATASET
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.store.artifacts import ArtifactNotFound
from infra.trained import fetch_trained
from model.checkpoint import folder as checkpoint
from model.data.shards import ShardSet
from model.pretrained import RECIPE, SUMS, Pretrained, checksums, load_pretrained, save_pretrained
from model.recipe import dumps, loads_stage
from model.training.evaluate import Evaluation, evaluate, make_generator
from model.vae import HEADER, load_codec

ORIGIN = f"imported/{SUMS}"
"""The file of an imported checkpoint that lists, by digest, what it was made from."""


@dataclass(slots=True, frozen=True)
class Imported:
    """A published folder; no ref was moved."""

    manifest: Manifest
    origin: str
    """Sha256 of the folder's checksums."""
    codec: Manifest
    codec_is_promoted: bool
    """The store's `codec/promoted` is this codec, so a stage trained here can grow from the checkpoint."""


def export_pretrained(
    registry: Registry, ref: str, folder: Path, work: Path, *, dtype: torch.dtype, max_shard_size: str
) -> Manifest:
    """Save the EMA weights of the checkpoint at `ref` into `folder`; returns the checkpoint."""
    trained = fetch_trained(registry, ref, work)
    save_pretrained(
        folder,
        trained.network(),
        trained.recipe,
        trained.codec(),
        dtype=dtype,
        max_shard_size=max_shard_size,
        source=f"checkpoint {trained.manifest.digest}",
    )
    return trained.manifest


def import_pretrained(registry: Registry, folder: Path, work: Path, *, measured: bool) -> Imported:
    """Publish `folder` as a checkpoint without optimizer state: to grow from, export and promote, not to resume.

    `measured` evaluates it on the store's held-out clips first, so that its recipe's gate can pass.

    Raises:
        ValueError: the folder is damaged or contradicts itself. ArtifactNotFound: nothing to measure on.
    """
    held = load_pretrained(folder)
    recipe = loads_stage((folder / RECIPE).read_bytes())
    trained = work / "checkpoint"
    shutil.rmtree(trained, ignore_errors=True)
    checkpoint.save_weights(trained, held.network.state_dict(), recipe)
    files = {path.name: path for path in sorted(trained.iterdir())}
    files[ORIGIN] = work / SUMS
    files[ORIGIN].write_text(checksums(folder))
    figures = {"imported": 1.0, "checkpoint_loads": 1.0}
    figures["parameters"] = float(sum(p.numel() for p in held.network.parameters()))
    parents: dict[str, str] = {}
    if measured:
        dataset = registry.resolve(DATASET)
        parents["dataset"] = dataset.digest
        done = _measure(held, registry.fetch(dataset, work / "inputs" / dataset.digest[:16]), work / "evaluation")
        figures |= done.metrics
        files |= {EVALUATION + path.name: path for path in done.files}
    codec, promoted = _codec(registry, held, work)
    parents["codec"] = codec.digest
    manifest = registry.publish(
        "checkpoint", files, rules=recipe.gate, recipe=json.loads(dumps(recipe)), metrics=figures, parents=parents
    )
    origin = hashlib.sha256(files[ORIGIN].read_bytes()).hexdigest()
    return Imported(manifest, origin, codec, promoted)


def _measure(held: Pretrained, dataset: Path, folder: Path) -> Evaluation:
    generator = make_generator(held.recipe, held.network, held.codec)
    return evaluate(generator, ShardSet(dataset / "heldout"), folder)


def _codec(registry: Registry, held: Pretrained, work: Path) -> tuple[Manifest, bool]:
    """The folder's codec: the promoted one where they are the same, else published; and whether it is promoted."""
    own = work / "codec"
    shutil.rmtree(own, ignore_errors=True)
    load_codec(held.codec, held.recipe.vae).save(own)
    try:
        standing = registry.resolve(CODEC)
    except ArtifactNotFound:
        standing = None
    if standing and _facts(registry.fetch(standing, work / "inputs" / standing.digest[:16])) == _facts(own):
        return standing, True
    files = {path.name: path for path in sorted(own.iterdir())}
    return registry.publish("codec", files, recipe=json.loads(dumps(held.recipe.vae))), False


def _facts(codec: Path) -> dict[str, Any]:
    """What decides latents: settings and the digest of the weights, without the figures measured when it was made."""
    return {key: value for key, value in json.loads((codec / HEADER).read_text()).items() if key != "metadata"}
