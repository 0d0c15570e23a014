"""Batches made ahead by other processes: the same to the bit, counted when they are consumed, and no hang."""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from model.config import BucketConfig, DataConfig, VideoConfig
from model.data.clips import shape_samples
from model.data.encoding import Encoding
from model.data.loader import ClipLoader
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import SampleCorrupt, ShardSet

BUCKETS = (BucketConfig(num_frames=4, height=16, width=16), BucketConfig(num_frames=1, height=32, width=32))


def write(folder: Path) -> ShardSet:
    with ShardWriter(folder, max_samples=8, encoding=Encoding()) as writer:
        for sample in shape_samples(generate(24, num_frames=6, size=32, seed=0)):
            writer.write(sample)
    return ShardSet(folder)


@contextmanager
def loader(shards: ShardSet, workers: int) -> Generator[ClipLoader]:
    made = ClipLoader(
        shards,
        video=VideoConfig(num_frames=4, height=16, width=16),
        data=DataConfig(),
        micro_batch_size=4,
        rank=0,
        world_size=1,
        seed=0,
        task="t2v",
        buckets=BUCKETS,
        accumulation=2,
        workers=workers,
    )
    try:
        yield made
    finally:
        made.close()


def test_workers_give_the_same_batches_and_only_what_is_consumed_counts(tmp_path: Path) -> None:
    shards = write(tmp_path)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with loader(shards, 0) as alone, loader(shards, 2) as ahead:
        for _ in range(4):
            for one, two in zip(islice(alone, 2), islice(ahead, 2), strict=True):
                assert torch.equal(one.clips, two.clips) and torch.equal(one.micro, two.micro)
                assert (one.keys, one.captions, one.numbers) == (two.keys, two.captions, two.numbers)
                assert one.bucket == two.bucket
            assert alone.state_dict() == ahead.state_dict()
        assert torch.equal(torch.get_rng_state(), before), "workers draw nothing from the run's own generator"
        workers = processes()
        assert len(workers) == 2
        assert all(os.getpgid(worker.pid) != os.getpgid(0) for worker in workers), "a SIGTERM to the rank spares them"
        ahead.load_state_dict({"step": 0, "drawn": [0, 0]})
        psutil.wait_procs(workers, timeout=20)
        assert not [worker for worker in workers if worker.is_running()]
        with loader(shards, 0) as anew:
            assert next(ahead).numbers == next(anew).numbers
    assert not processes()


def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path: Path) -> None:
    with loader(write(tmp_path), 1) as batches:
        next(batches)
        for worker in processes():
            worker.send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed by signal|exited unexpectedly)"):
            list(islice(batches, 20))


def test_an_error_in_a_worker_is_the_error_it_would_be_here(tmp_path: Path) -> None:
    shards = write(tmp_path)
    path = tmp_path / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-20000] + bytes(20000))
    with loader(shards, 1) as batches, pytest.raises(SampleCorrupt, match=r"shard-00001.tar: sample 'moving_shapes-"):
        list(islice(batches, 20))


def processes() -> list[psutil.Process]:
    """The workers that live; not multiprocessing's own helper."""
    children = psutil.Process().children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
