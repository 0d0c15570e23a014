"""How fast an S3 server takes and gives bytes at all.

It owns the plain way: as many connections as asked for, each sending or asking for objects as large as our store's
parts with one request each, signed by hand with the payload left unsigned, so that the client hashes nothing, keeps
nothing, and no library is in the way. It knows nothing of our store.
"""

import hashlib
import hmac
import http.client
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from infra.store.s3_parts import PART
from tests.s3_server import S3Server

CONNECTIONS = (4, 10)
"""The raw rate is the best of these."""
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where a server's files are no disk's matter."""


def put(server: S3Server, data: Sequence[bytes], connections: int) -> list[str]:
    """Send each part of the data as an object of its own; the paths."""
    parts = [memoryview(whole)[first : first + PART] for whole in data for first in range(0, len(whole), PART)]
    place = f"/{server.bucket}/{uuid4().hex}"
    paths = [f"{place}/{number}" for number in range(len(parts))]

    def send(connection: http.client.HTTPConnection, number: int) -> None:
        connection.request("PUT", paths[number], body=parts[number], headers=_signed(server, "PUT", paths[number]))
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status

    _share(server, len(parts), connections, send)
    return paths


def get(server: S3Server, paths: Sequence[str], connections: int) -> None:
    """Fetch objects and drop what comes."""

    def fetch(connection: http.client.HTTPConnection, number: int) -> None:
        connection.request("GET", paths[number], headers=_signed(server, "GET", paths[number]))
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        buffer = bytearray(1 << 20)
        while answer.readinto(buffer):
            pass

    _share(server, len(paths), connections, fetch)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _share(
    server: S3Server, count: int, connections: int, work: Callable[[http.client.HTTPConnection, int], None]
) -> None:
    def share(first: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(server.endpoint).netloc)
        for number in range(first, count, connections):
            work(connection, number)
        connection.close()

    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(share, range(connections)))


def _signed(server: S3Server, method: str, path: str) -> dict[str, str]:
    """AWS's signature, version 4, of a request whose payload is not signed."""
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
    request = f"{method}\n{path}\n\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
    scope = f"{day}/{access.region}/s3/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{access.secret_key}".encode()
    for word in (*scope.split("/"), to_sign):
        key = hmac.digest(key, word.encode(), "sha256")
    credential = f"AWS4-HMAC-SHA256 Credential={access.access_key}/{scope}"
    return {**headers, "Authorization": f"{credential}, SignedHeaders={names}, Signature={key.hex()}"}
