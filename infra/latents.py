"""A curriculum's data set as latents: encode it with the promoted codec at a stage's size, publish and promote that.

It owns which sets are encoded and the ref that names the result; how a clip is encoded is `model.data.latents`'.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from infra.registry.names import CODEC, DATASET, latents
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from model.config import GateRule
from model.data.corpus import CorpusFolder
from model.data.latents import codec_digest, encode_shards
from model.data.shards import LatentsOf, ShardSet
from model.recipe import StageRecipe
from model.vae import load_codec

Dtype = Literal["float16", "float32"]
GATE = (GateRule(metric="train_samples", op=">=", bound=1),)


def encode_dataset(
    registry: Registry,
    recipe: StageRecipe,
    work: Path,
    *,
    who: str,
    dtype: Dtype = "float16",
    device: str = "cpu",
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Encode the promoted data set's training clips at the size of `recipe`, and promote the set of latents.

    Held-out clips stay pixels, which measuring needs. The same data set, codec, size and dtype are not encoded again.
    """
    dataset, codec = registry.resolve(DATASET), registry.resolve(CODEC)
    source = CorpusFolder(registry.fetch(dataset, work / "inputs" / dataset.digest[:16]))
    codec_folder = registry.fetch(codec, work / "inputs" / codec.digest[:16])
    of = LatentsOf(codec=codec_digest(codec_folder), height=recipe.video.height, width=recipe.video.width, dtype=dtype)
    encoded = CorpusFolder(work / f"latents-{dataset.digest[:16]}-{codec.digest[:16]}-{of.height}x{of.width}-{dtype}")
    if not (encoded.train / "index.json").exists():
        clips = ShardSet(source.train)
        encode_shards(
            clips,
            encoded.train,
            load_codec(codec_folder, recipe.vae),
            of,
            device=device,
            on_clip=lambda done: on_clip(done, len(clips)),
        )
    heldout = {name: path for name, path in source.files().items() if name.startswith("heldout/")}
    stored = sum(shard.size for shard in ShardSet(encoded.train).index.shards)
    metrics = {
        "train_samples": float(len(ShardSet(encoded.train))),
        "bytes": float(stored),
        "ratio_to_clips": stored / sum(shard.size for shard in ShardSet(source.train).index.shards),
    }
    manifest = registry.publish(
        "dataset",
        encoded.files() | heldout,
        rules=GATE,
        recipe=of.model_dump(),
        metrics=metrics,
        parents={"dataset": dataset.digest, "codec": codec.digest},
    )
    ref = latents(of.height, of.width)
    registry.promote(ref, manifest.digest, who=who, why=f"encoded for {recipe.name}")
    return manifest


def dtype_of(name: str) -> Dtype:
    if name not in ("float16", "float32"):
        raise ValueError(f"dtype '{name}' is no type of stored latents; use float16 or float32")
    return name


def require_current(name: str, encoded: Manifest, dataset: Manifest, codec: Manifest) -> None:
    """Refuse latents of another data set or codec than those promoted now."""
    for role, promoted in (("dataset", dataset), ("codec", codec)):
        if encoded.parents.get(role) != promoted.digest:
            raise ValueError(
                f"'{name}' was encoded from {role} {str(encoded.parents.get(role))[:16]}, promoted is"
                f" {promoted.digest[:16]}; run `stiv encode` again, or set data.form 'clips'"
            )
