"""The loaders that `benchmarks.loader` compares, over the same clips: mp4 bytes in, float32 batches out.

It owns what each stores and how each is set up; it measures nothing. Every one reads the bytes that our shards hold,
takes `FRAMES` frames `STRIDE` apart from a random place, crops a random square and resizes it, in `WORKERS` processes,
and hands out [BATCH, FRAMES, 3, SIDE, SIDE] in [-1, 1], made from uint8 in the process that consumes it. The peers
share one decoder, as one writes it with PyAV: seek to the key frame, decode up to the last frame wanted, convert only
those that are.
"""

import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import av
import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.config import DataConfig, VideoConfig
from model.data.encoding import Encoding
from model.data.loader import ClipLoader
from model.data.shard_writer import ShardWriter
from model.data.shards import Sample, ShardSet

FRAMES, STRIDE, SIDE, BATCH, WORKERS = 16, 2, 128, 4, 2
STORED = (48, 192, 256)
"""Frames, height and width of a stored clip."""
SOURCE = "textures"


def write_clips(folder: Path, count: int) -> None:
    """The same clips for everyone: shards, mp4 files, webdataset's tars and streaming's MDS."""
    with ShardWriter(folder / "ours", max_samples=64, encoding=Encoding()) as writer:
        for index in range(count):
            writer.write(textures(index))
    clips = dict(stored_clips(folder / "ours"))
    (folder / "torch").mkdir()
    for key, data in clips.items():
        (folder / "torch" / f"{key}.mp4").write_bytes(data)
    (folder / "webdataset").mkdir()
    with _library("webdataset").ShardWriter(str(folder / "webdataset" / "%05d.tar"), maxcount=64, verbose=0) as wds:
        for key, data in clips.items():
            wds.write({"__key__": key, "mp4": data})
    with _streaming().MDSWriter(out=str(folder / "streaming"), columns={"mp4": "bytes"}) as mds:
        for data in clips.values():
            mds.write({"mp4": data})


def textures(index: int) -> Sample:
    """A camera that pans over a picture with detail at every scale, with a little noise: some 100 kB as H.264."""
    frames, height, width = STORED
    rng = np.random.default_rng(index)
    scene = np.zeros((2 * height, 2 * width, 3), np.float32)
    for cells in (4, 16, 64):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        scene += cv2.resize(noise, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC) * 60 / cells**0.4
    pixels = np.empty((frames, height, width, 3), np.uint8)
    for frame in range(frames):
        top, left = frame * (index % 5), frame * (index % 3)
        view = scene[top : top + height, left : left + width] + 128
        pixels[frame] = np.clip(view + 2 * rng.standard_normal((height, width, 1), np.float32), 0, 255)
    return Sample(f"clip-{index:05d}", pixels, "a texture", SOURCE, "CC0", "nobody", 24.0, height, width)


def stored_clips(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Key and mp4 of every clip in a shard set."""
    shards = ShardSet(folder)
    for entry in shards.entries:
        data = (folder / shards.index.shards[entry.shard].name).read_bytes()
        assert entry.size is not None
        yield entry.key, data[entry.offset : entry.offset + entry.size]


def ours(folder: Path, seed: int) -> Iterator[Tensor]:
    loader = our_loader(folder, seed=seed, workers=WORKERS)
    return (batch.frames for batch in loader)


def our_loader(folder: Path, *, seed: int, workers: int, rank: int = 0, world_size: int = 1) -> ClipLoader:
    return ClipLoader(
        ShardSet(folder / "ours"),
        video=VideoConfig(num_frames=FRAMES, height=SIDE, width=SIDE, frame_stride=STRIDE),
        data=DataConfig(weights={SOURCE: 1.0}),
        micro_batch_size=BATCH // world_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        task="t2v",
        workers=workers,
    )


class _Files(Dataset[npt.NDArray[np.uint8]]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.mp4"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        return cut(str(self.paths[index]))


def torch_files(folder: Path, seed: int) -> Iterator[Tensor]:
    """torch's DataLoader over plain files, shuffled."""
    files = _Files(folder / "torch")
    return _endless(
        lambda: DataLoader(files, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True)
    )


def webdataset(folder: Path, seed: int) -> Iterator[Tensor]:
    """Tars in random order, a buffer of clips to mix them; batches are made in the workers, as it recommends."""
    wds = _library("webdataset")
    urls = sorted(str(path) for path in (folder / "webdataset").glob("*.tar"))
    chain = wds.WebDataset(urls, resampled=True, shardshuffle=False, seed=seed).shuffle(64)
    chain = chain.map(_member).batched(BATCH, collation_fn=np.stack, partial=False)
    loader = wds.WebLoader(chain, batch_size=None, num_workers=WORKERS)
    return (_floats(torch.as_tensor(batch)) for batch in loader)


def streaming(folder: Path, seed: int) -> Iterator[Tensor]:
    """MosaicML's StreamingDataset over local MDS shards, shuffled."""
    library = _streaming()

    class Clips(library.StreamingDataset):  # pyright: ignore[reportUntypedBaseClass]
        def __getitem__(self, at: int) -> npt.NDArray[np.uint8]:
            return _member(super().__getitem__(at))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]

    clips = Clips(local=str(folder / "streaming"), shuffle=True, shuffle_seed=seed, batch_size=BATCH)
    return _endless(
        lambda: DataLoader(cast(Any, clips), BATCH, num_workers=WORKERS, drop_last=True, persistent_workers=True)
    )


CONTESTANTS: Mapping[str, Callable[[Path, int], Iterator[Tensor]]] = {
    "ours": ours,
    "torch": torch_files,
    "webdataset": webdataset,
    "streaming": streaming,
}


def cut(source: str | io.BytesIO) -> npt.NDArray[np.uint8]:
    """uint8 [FRAMES, SIDE, SIDE, 3] of an mp4, at random in time and space."""
    total, height, width = STORED
    start = int(torch.randint(total - (FRAMES - 1) * STRIDE, ()))
    wanted = set(range(start, start + FRAMES * STRIDE, STRIDE))
    side = min(height, width)
    top, left = (int(torch.randint(extent - side + 1, ())) for extent in (height, width))
    clip = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    with av.open(source, "r") as opened:
        container: Any = opened
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        ticks = round(1 / (video.average_rate * video.time_base))
        container.seek(start * ticks, stream=video)
        row = 0
        for frame in container.decode(video):
            if frame.pts // ticks in wanted:
                pixels = frame.to_ndarray(format="rgb24")[top : top + side, left : left + side]
                clip[row] = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
                row += 1
                if row == FRAMES:
                    break
    return clip


def _member(sample: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    return cut(io.BytesIO(sample["mp4"]))


def _endless(epoch: Callable[[], DataLoader[Any]]) -> Iterator[Tensor]:
    """Epoch after epoch by the same processes."""
    loader = epoch()
    while True:
        for batch in loader:
            yield _floats(batch)


def _floats(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 1, 4, 2, 3).contiguous().to(torch.float32).div_(127.5).sub_(1.0)


def _library(name: str) -> Any:
    """By name: the peers are not among our requirements, since one of them wants an older NumPy."""
    return importlib.import_module(name)


def _streaming() -> Any:
    """`streaming.base`, without the package's own imports of example data sets, which want a torchvision."""
    spec = importlib.util.find_spec("streaming")
    if spec is None:
        raise ModuleNotFoundError("mosaicml-streaming is not installed")
    package = ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules.setdefault("streaming", package)
    return _library("streaming.base")
