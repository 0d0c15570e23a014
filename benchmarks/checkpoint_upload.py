"""How fast a checkpoint gets to a real S3 server, and how fast that server takes bytes at all.

It owns the server (SeaweedFS, a fresh one a turn, in memory where this machine has such a folder, so that no disk is
the limit), the bytes and both rates. The raw rate is the best of plain ways: as many connections as our store uses, and
fewer, each sending objects as large as our store's parts with one PUT each, signed by hand with the payload left
unsigned, so that the client hashes nothing and no library is in the way. Who goes first changes with the turn.
"""

import hashlib
import hmac
import http.client
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from torch import Tensor

from flows.catalog import recipe_path
from infra.checkpoints import StoreSink
from infra.store.location import open_store
from model.checkpoint.manifest import Manifest
from model.checkpoint.state import PARTS, Piece, RankState, random_state
from model.checkpoint.upload import Upload
from model.checkpoint.writer import CheckpointWriter
from model.recipe import StageRecipe, load
from tests.s3_server import S3Server, running_server

PART = 8 << 20
"""Bytes of a part, as boto3 sends them."""
CONNECTIONS = (4, 10)
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def upload_figures(scratch: Path, *, gigabytes: float, turns: int) -> dict[str, float]:
    """Both rates, in turns."""
    folder = _checkpoint(scratch / "upload", gigabytes)
    data = [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]
    size = sum(map(len, data))
    rates: dict[str, list[float]] = {name: [] for name in ("ours", *(f"raw{count}" for count in CONNECTIONS))}
    for turn in range(turns):
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as place, running_server(Path(place)) as server:
            _through_our_store(server, folder)  # a fresh server makes its volumes with the first bytes
            calls: dict[str, Callable[[], float]] = {"ours": lambda s=server: _through_our_store(s, folder)}
            for count in CONNECTIONS:
                calls[f"raw{count}"] = lambda s=server, n=count: _seconds(lambda: _raw(s, data, n))
            names = list(calls)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                rates[name].append(size / calls[name]())
    raw = [rates[f"raw{count}"] for count in CONNECTIONS]
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
    seconds = _seconds(lambda: upload.send(folder, files, uuid4().hex))
    assert sink.latest() is not None
    return seconds


def _raw(server: S3Server, data: list[bytes], connections: int) -> None:
    parts = [memoryview(whole)[first : first + PART] for whole in data for first in range(0, len(whole), PART)]
    place = f"/{server.bucket}/{uuid4().hex}"

    def send(share: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(server.endpoint).netloc)
        for number in range(share, len(parts), connections):
            path = f"{place}/{number}"
            connection.request("PUT", path, body=parts[number], headers=_signed(server, path))
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
        connection.close()

    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(send, range(connections)))


def _signed(server: S3Server, path: str) -> dict[str, str]:
    """AWS's signature, version 4, of a PUT whose payload is not signed."""
    access = server.access
    assert access.access_key and access.secret_key and access.region
    now = datetime.now(UTC)
    day, moment = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
    headers = {
        "host": urlsplit(server.endpoint).netloc,
        "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
        "x-amz-date": moment,
    }
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = f"PUT\n{path}\n\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
    scope = f"{day}/{access.region}/s3/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{access.secret_key}".encode()
    for word in (*scope.split("/"), to_sign):
        key = hmac.digest(key, word.encode(), "sha256")
    credential = f"AWS4-HMAC-SHA256 Credential={access.access_key}/{scope}"
    return {**headers, "Authorization": f"{credential}, SignedHeaders={names}, Signature={key.hex()}"}


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
