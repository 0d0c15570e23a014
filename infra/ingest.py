"""Ingest: from raw videos and drawn shapes to a promoted data set and codec in the registry.

It owns the order and the gate; it knows nothing of how clips are drawn, cut or coded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from infra.registry.names import CODEC, DATASET
from infra.registry.records import GateReport, Manifest
from infra.registry.registry import Registry
from model.data.corpus import build_corpus, fit_codec
from model.data.shards import ShardSet
from model.recipe import Curriculum, dumps


@dataclass(slots=True, frozen=True)
class Ingested:
    """What a curriculum trains on."""

    dataset: Manifest
    codec: Manifest
    gate: GateReport


def ingest(registry: Registry, curriculum: Curriculum, work: Path, *, videos: Path | None, who: str) -> Ingested:
    """Build corpus and codec below `work`, publish both, and promote them through `corpus.gate`.

    Raises:
        ValueError: no usable video in `videos`, a corrupt one, or one without its caption; nothing is published.
        PromotionRefused: the gate did not hold; both are published, no ref moves.
    """
    stage = max(curriculum.stages, key=lambda stage: stage.video.num_frames)
    corpus = build_corpus(work / "corpus", curriculum.corpus, videos)
    codec_folder = work / "codec"
    metrics = fit_codec(corpus, stage.vae, stage.video, codec_folder)
    for split, folder in (("train", corpus.train), ("heldout", corpus.heldout)):
        for source, totals in ShardSet(folder).sources.items():
            metrics[f"{split}_samples_{source}"] = float(totals.samples)
    metrics["train_samples"] = float(len(ShardSet(corpus.train)))
    settings = json.loads(dumps(curriculum.corpus))
    rules = curriculum.corpus.gate
    dataset = registry.publish("dataset", corpus.files(), rules=rules, recipe=settings, metrics=metrics)
    files = {path.name: path for path in sorted(codec_folder.iterdir())}
    codec = registry.publish(
        "codec",
        files,
        rules=rules,
        recipe=json.loads(dumps(stage.vae)),
        metrics=metrics,
        parents={"dataset": dataset.digest},
    )
    for ref, manifest in ((DATASET, dataset), (CODEC, codec)):
        moved = registry.promote(ref, manifest.digest, who=who, why=f"ingested for curriculum {curriculum.name}")
    return Ingested(dataset, codec, moved.gate)
