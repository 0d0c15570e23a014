"""Large objects in parts: several on their way at once, in bounded memory, each held to its checksum.

It owns the size of a part and the order of pieces; it knows nothing of digests' meaning, nor of who may overwrite what.
"""

import hashlib
import logging
import os
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from infra.store.s3_client import CONNECTIONS, Answer, Lost, Refused, S3Client, repeated

logger = logging.getLogger(__name__)

T = TypeVar("T")

PART = 8 << 20
"""Bytes. A transfer holds at most `CONNECTIONS + 1` parts in memory."""
MOST_PARTS = 10_000
_MIB = 1 << 20


def checksum(data: bytes | bytearray) -> str:
    """A sha256 as S3 writes it."""
    return b64encode(hashlib.sha256(data).digest()).decode()


def part_size(size: int) -> int:
    """Bytes of a part of an object of that size: S3 takes ten thousand parts at most."""
    return max(PART, -(-size // (MOST_PARTS * _MIB)) * _MIB)


@contextmanager
def sent_in_parts(client: S3Client, key: str, path: Path, metadata: Mapping[str, str]) -> Generator[dict[str, Any]]:
    """All parts of a file, sent; yields what completes the upload, which is given up if that does not happen.

    `key` is the whole one, prefix included.
    """
    size = path.stat().st_size
    step = part_size(size)
    opened = client.asked(key, "create_multipart_upload", Key=key, Metadata=metadata, ChecksumAlgorithm="SHA256")
    place = {"Key": key, "UploadId": opened["UploadId"]}
    spare: list[bytearray] = []
    try:
        with path.open("rb") as file, ThreadPoolExecutor(CONNECTIONS) as pool:

            def send(number: int) -> dict[str, Any]:
                # boto3 copies `bytes` once more to put them behind the head; a bytearray goes as it is, and again.
                whole = spare.pop() if spare else bytearray(step)
                length = os.preadv(file.fileno(), [whole], (number - 1) * step)
                data = whole if length == step else whole[:length]
                proof = checksum(data)
                answer = client.asked(key, "upload_part", **place, PartNumber=number, Body=data, ChecksumSHA256=proof)
                spare.append(whole)
                return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": proof}

            calls = (partial(send, number) for number in range(1, -(-size // step) + 1))
            parts = list(in_order(pool, calls, ahead=2 * CONNECTIONS))
        yield {**place, "MultipartUpload": {"Parts": parts}}
    except BaseException:
        give_up(client, **place)
        raise


def give_up(client: S3Client, **upload: str) -> None:
    """Drop the parts of an upload that will not be completed; what cannot be dropped now, `clear_unfinished` drops."""
    try:
        repeated(lambda: client.once("abort_multipart_upload", **upload))
    except Refused as error:
        if error.status != 404:
            logger.warning("the parts of upload %s of %s stay: %s", upload["UploadId"], upload["Key"], error)
    except Lost as error:
        logger.warning("the parts of upload %s of %s stay: %s", upload["UploadId"], upload["Key"], error)


def pieces(client: S3Client, key: str, shown: str) -> Iterator[bytes]:
    """An object's bytes in order, fetched in ranges of one version; `shown` names it in errors."""

    def fetch(start: int, **condition: str) -> tuple[bytes, Answer]:
        span = f"bytes={start}-{start + PART - 1}"
        return repeated(lambda: client.once_with_body(Key=key, Range=span, **condition))

    with client.explained(shown):
        try:
            data, answer = fetch(0)
        except Refused as error:
            if error.status != 416:
                raise
            data, answer = repeated(lambda: client.once_with_body(Key=key))  # an empty object has no range
        yield data
        size = int(answer.get("ContentRange", f"/{len(data)}").rpartition("/")[2])
        starts = range(len(data), size, PART)
        if not starts:
            return
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            calls = (partial(fetch, start, IfMatch=answer["ETag"]) for start in starts)
            try:
                yield from (piece for piece, _ in in_order(pool, calls, ahead=CONNECTIONS))
            except Refused as error:
                if error.status != 412:
                    raise
                raise ConnectionError(f"{client.url}/{shown} was replaced while it was read; fetch it again") from error


def in_order(pool: ThreadPoolExecutor, calls: Iterator[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Results in the order of the calls, of which `ahead` are begun before the first is taken."""
    begun: deque[Future[T]] = deque()
    try:
        for call in calls:
            begun.append(pool.submit(call))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
