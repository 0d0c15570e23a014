"""The loader benchmark compares like with like, and its figures are of what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.contestants.loader_peers import (
    BATCH,
    FRAMES,
    SIDE,
    STORED,
    STRIDE,
    cut,
    our_loader,
    stored_clips,
    textures,
)
from benchmarks.loader import figures_of, resumes_exactly
from model.data.encoding import Encoding
from model.data.shard_writer import ShardWriter


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    with ShardWriter(folder / "ours", encoding=Encoding()) as writer:
        for index in range(6):
            writer.write(textures(index))
    return folder


def test_a_ratio_is_to_the_best_peer_of_the_same_turn() -> None:
    figures = figures_of({"ours": [10.0, 30.0, 12.0], "torch": [5.0, 60.0, 4.0], "streaming": [8.0, 10.0, 6.0]})
    assert figures["samples_per_second"] == 12.0 and figures["torch_samples_per_second"] == 5.0
    assert figures["ratio_to_best_peer"] == 1.25


def test_both_decoders_make_the_same_clips_of_the_same_bytes(clips: Path, tmp_path: Path) -> None:
    """A peer's cut is found in what ours reads of that clip: same frames, same crop, same size."""
    batch = next(our_loader(clips, seed=0, workers=0))
    assert tuple(batch.frames.shape) == (BATCH, FRAMES, 3, SIDE, SIDE)
    stored = dict(stored_clips(clips / "ours"))
    path = tmp_path / "clip.mp4"
    path.write_bytes(stored[batch.keys[0]])
    wanted = batch.clips[0].numpy()
    tries = (STORED[0] - (FRAMES - 1) * STRIDE) * (STORED[2] - STORED[1] + 1) // 2
    torch.manual_seed(0)
    nearest = min(float(np.abs(cut(str(path)).astype(int) - wanted).mean()) for _ in range(min(tries, 60)))
    far = float(np.abs(batch.clips[1].numpy().astype(int) - wanted).mean())
    assert nearest < far / 2


def test_resumption_is_checked_on_real_clips(clips: Path) -> None:
    assert resumes_exactly(clips)
