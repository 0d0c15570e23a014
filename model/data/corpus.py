"""A corpus: drawn and filmed clips written as training and held-out shards, and the codec fitted to them.

It owns the split and what a corpus folder holds (`train/`, `heldout/`); it knows nothing of stages or stores.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import CorpusConfig, DataConfig, VaeConfig, VideoConfig
from model.data.clips import folder_samples, shape_samples
from model.data.loader import ClipLoader
from model.data.moving_shapes import generate
from model.data.scenes import SceneConfig
from model.data.shard_writer import ShardWriter
from model.data.shards import Sample, ShardSet
from model.vae import FrameCodec, PatchPca, load_codec, psnr

HELDOUT_EVERY = 3
"""Of a video's segments every third is held out; drawn clips have a held-out set of their own."""
FIT_CLIPS = 128


@dataclass(slots=True, frozen=True)
class CorpusFolder:
    """Where a corpus lies."""

    root: Path

    @property
    def train(self) -> Path:
        return self.root / "train"

    @property
    def heldout(self) -> Path:
        return self.root / "heldout"

    def files(self) -> dict[str, Path]:
        """Every file by its name inside the corpus."""
        return {str(path.relative_to(self.root)): path for path in sorted(self.root.rglob("*")) if path.is_file()}


def build_corpus(folder: Path, config: CorpusConfig, videos: Path | None = None) -> CorpusFolder:
    """Draw moving shapes, cut and decode every video in the folder `videos`, and write both as shards."""
    corpus = CorpusFolder(folder)
    filmed = [] if videos is None else _filmed(videos, config)
    kept = [sample for place, sample in enumerate(filmed) if place % HELDOUT_EVERY != HELDOUT_EVERY - 1]
    held = [sample for place, sample in enumerate(filmed) if place % HELDOUT_EVERY == HELDOUT_EVERY - 1]
    if filmed and not held:
        held = kept[-1:]  # a corpus of one or two segments is measured on what it has
    _write(corpus.train, _drawn(config, config.shapes, config.seed), kept)
    _write(corpus.heldout, _drawn(config, config.heldout_shapes, config.seed + 1), held)
    return corpus


def fit_codec(corpus: CorpusFolder, vae: VaeConfig, video: VideoConfig, folder: Path) -> dict[str, float]:
    """Fit `patch_pca` to clips of every source (or load the named codec), save it, return its PSNR by source."""
    train = ShardSet(corpus.train)
    codec: FrameCodec
    if vae.type == "patch_pca":
        drawn = [_frames(train, video, source, FIT_CLIPS) for source in train.sources]
        codec = PatchPca.fit(torch.cat(drawn), vae.latent_channels, vae.spatial_factor, vae.whitening)
    else:
        codec = load_codec(folder, vae)
    heldout = ShardSet(corpus.heldout)
    figures: dict[str, float] = {}
    for source in heldout.sources:
        frames = _frames(heldout, video, source, 32)
        figures[f"psnr_db_{source}"] = psnr(codec.decode(codec.encode(frames)), frames)
    folder.mkdir(parents=True, exist_ok=True)
    codec.save(folder, figures)
    return figures


def _drawn(config: CorpusConfig, count: int, seed: int) -> Iterable[Sample]:
    return shape_samples(generate(count, num_frames=config.num_frames, size=config.size, seed=seed))


def _filmed(videos: Path, config: CorpusConfig) -> list[Sample]:
    return list(folder_samples(videos, SceneConfig(short_side=2 * config.size)))


def _write(folder: Path, drawn: Iterable[Sample], filmed: Iterable[Sample]) -> None:
    with ShardWriter(folder) as writer:
        for sample in filmed:
            writer.write(sample)
        for sample in drawn:
            writer.write(sample)


def _frames(shards: ShardSet, video: VideoConfig, source: str, count: int) -> torch.Tensor:
    loader = ClipLoader(
        shards,
        video=video,
        data=DataConfig(weights={source: 1.0}),
        micro_batch_size=count,
        rank=0,
        world_size=1,
        seed=0,
        task="t2v",
    )
    return next(loader).frames
