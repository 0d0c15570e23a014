"""Our loader against torch's, webdataset and MosaicML streaming: `python -m benchmarks.loader --peers FOLDER`.

It owns clocks and figures; `loader_peers` owns what is compared and says what is equal. The peers are installed beside
our environment, because streaming asks for NumPy below 2.2 and for clouds' clients that reading a folder needs none of:

    pip install --no-deps --target runs/peers webdataset==1.0.2 mosaicml-streaming==0.13.0 \
        braceexpand brotli catalogue cramjam python-snappy xxhash zstd

Loaders take turns, each turn in a process of its own with the same number of workers; the first batches, while
processes start, do not count. A figure is the median over turns; a ratio is of one turn.

- `samples_per_second`: ours. `ratio_to_best_peer`: ours to the fastest peer of the same turn.
- `resumes_exactly`: 1 if, stopped and resumed on two ranks, ours goes on with the very clips, bit for bit. Of the
  peers, DataLoader and webdataset keep no place; streaming goes on in the order of its samples, on other ranks too, but
  what is random about a sample, such as its crop, is drawn anew.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from benchmarks.contestants.loader_peers import BATCH, CONTESTANTS, our_loader, write_clips
from benchmarks.result import report

ROOT = Path(__file__).parent.parent
PEERS = ("webdataset", "mosaicml-streaming", "av", "opencv-python-headless")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="folder with webdataset and mosaicml-streaming")
    parser.add_argument("--quick", action="store_true", help="few clips, one turn; keeps nothing")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.append(str(arguments.peers))
    if arguments.turn:
        name, folder, batches = arguments.turn
        print(json.dumps(samples_per_second(name, Path(folder), int(batches))))
        return
    quick = bool(arguments.quick)
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        write_clips(Path(scratch), 64 if quick else 512)
        speeds = take_turns(Path(scratch), arguments.peers, turns=1 if quick else 7, batches=10 if quick else 60)
        figures = figures_of(speeds) | {"resumes_exactly": float(resumes_exactly(Path(scratch)))}
    report("loader", figures, quick=quick, peers=PEERS)


def take_turns(folder: Path, peers: Path, *, turns: int, batches: int) -> dict[str, list[float]]:
    """Samples a second of each loader in each turn."""
    speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(turns):
        for name in CONTESTANTS:
            command = [sys.executable, "-m", "benchmarks.loader", "--peers", str(peers.absolute())]
            command += ["--turn", name, str(folder), str(batches)]
            told = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            speeds[name].append(float(told.splitlines()[-1]))
    return speeds


def figures_of(speeds: dict[str, list[float]]) -> dict[str, float]:
    best = [max(its) for its in zip(*(speeds[name] for name in speeds if name != "ours"), strict=True)]
    figures = {"samples_per_second": statistics.median(speeds["ours"])}
    figures |= {f"{name}_samples_per_second": statistics.median(its) for name, its in speeds.items() if name != "ours"}
    ratios = [mine / its for mine, its in zip(speeds["ours"], best, strict=True)]
    return figures | {"ratio_to_best_peer": statistics.median(ratios)}


def samples_per_second(name: str, folder: Path, batches: int) -> float:
    """Of one loader, once its processes have given their first batches."""
    torch.set_num_threads(1)
    iterator = CONTESTANTS[name](folder, 0)
    for _ in islice(iterator, 8):
        pass
    began = time.perf_counter()
    for frames in islice(iterator, batches):
        assert frames.shape[0] == BATCH and frames.dtype == torch.float32
    return batches * BATCH / (time.perf_counter() - began)


def resumes_exactly(folder: Path) -> bool:
    """Whether one rank for ten batches equals one for five and then two."""
    alone = our_loader(folder, seed=1, workers=0)
    whole = [next(alone) for _ in range(10)]
    first = our_loader(folder, seed=1, workers=0)
    for _ in range(5):
        next(first)
    ranks = [our_loader(folder, seed=1, workers=0, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(first.state_dict())
    return all(torch.equal(torch.cat([next(rank).clips for rank in ranks]), wanted.clips) for wanted in whole[5:])


if __name__ == "__main__":
    main()
