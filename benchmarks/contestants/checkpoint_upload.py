"""How fast a checkpoint gets to a real S3 server, and how fast that server takes bytes at all.

It owns the server (SeaweedFS, a fresh one a turn, in memory where this machine has such a folder, so that no disk is
the limit), the bytes and both rates; the raw one is `s3_raw`'s. Who goes first changes with the turn.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from benchmarks.contestants import s3_raw
from flows.catalog import recipe_path
from infra.checkpoints import StoreSink
from infra.store.location import open_store
from model.checkpoint.manifest import Manifest
from model.checkpoint.state import PARTS, Piece, RankState, random_state
from model.checkpoint.upload import Upload
from model.checkpoint.writer import CheckpointWriter
from model.recipe import StageRecipe, load
from tests.s3_server import S3Server, running_server


def upload_figures(scratch: Path, *, gigabytes: float, turns: int) -> dict[str, float]:
    """Both rates, in turns."""
    folder = _checkpoint(scratch / "upload", gigabytes)
    data = [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]
    size = sum(map(len, data))
    rates: dict[str, list[float]] = {name: [] for name in ("ours", *(f"raw{count}" for count in s3_raw.CONNECTIONS))}
    for turn in range(turns):
        with tempfile.TemporaryDirectory(dir=s3_raw.IN_MEMORY) as place, running_server(Path(place)) as server:
            _through_our_store(server, folder)  # a fresh server makes its volumes with the first bytes
            calls: dict[str, Callable[[], float]] = {"ours": lambda s=server: _through_our_store(s, folder)}
            for count in s3_raw.CONNECTIONS:
                calls[f"raw{count}"] = lambda s=server, n=count: s3_raw.seconds(lambda: s3_raw.put(s, data, n))
            names = list(calls)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                rates[name].append(size / calls[name]())
    raw = [rates[f"raw{count}"] for count in s3_raw.CONNECTIONS]
    return {
        "upload_bytes_per_second": statistics.median(rates["ours"]),
        "raw_bytes_per_second": max(statistics.median(its) for its in raw),
        "upload_ratio_to_raw": min(
            statistics.median(a / b for a, b in zip(rates["ours"], its, strict=True)) for its in raw
        ),
    }


def state_of(step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> RankState:
    """These tensors by part, as the state of a single rank."""
    return RankState(
        step=step,
        rank=0,
        world_size=1,
        tensors={part: {name: Piece.whole(x) for name, x in tensors[part].items()} for part in PARTS},
        random=random_state(),
        loader={},
        inputs={},
        recipe=_recipe(),
    )


@cache
def _recipe() -> StageRecipe:
    return load(recipe_path("tiny")).stages[0]


def _checkpoint(root: Path, gigabytes: float) -> Path:
    """A saved checkpoint of about that size, in tensors as a network has them."""
    count = max(3, round(gigabytes * 1e9 / (1152 * 4608 * 4)))
    tensors = {f"blocks.{place}.weight": torch.randn(1152, 4608) for place in range(count)}
    writer = CheckpointWriter(root, keep=1)
    writer.save(state_of(1, {part: dict(list(tensors.items())[place::3]) for place, part in enumerate(PARTS)}))
    folder = writer.wait()
    assert folder is not None
    return folder


def _through_our_store(server: S3Server, folder: Path) -> float:
    """Seconds of all that a rank's thread does once a checkpoint stands in the run folder, in a place of its own."""
    sink = StoreSink(open_store(server.url(), server.access))
    upload = Upload(folder.parent, sink, rank=0, world_size=1, patience=60)
    files = Manifest.read(folder).files
    seconds = s3_raw.seconds(lambda: upload.send(folder, files, uuid4().hex))
    assert sink.latest() is not None
    return seconds
