"""A store in an S3 bucket, on any server that honours conditions.

It owns how such a server keeps the promise of `infra.store.artifacts`, answers that are lost included; it knows nothing
of connections, nor of what is stored.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import cast

from infra.store.artifacts import (
    AlreadyExists,
    ArtifactNotFound,
    ArtifactStore,
    Conflict,
    OutcomeUnknown,
    Source,
    StoreRefused,
    Versioned,
    check_key,
    check_prefix,
)
from infra.store.s3_client import Answer, Lost, Refused, S3Access, S3Client, pauses, repeated
from infra.store.s3_parts import PART, checksum, give_up, pieces, sent_in_parts
from infra.store.s3_trail import Trail, new_writer

logger = logging.getLogger(__name__)

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PROBE = ".probe"
_IMPATIENT = 3
"""Attempts of the first question: a mistyped endpoint shall not take as long as a server that starts again."""
_UPLOADS = 5
"""Times a blob is sent before rivals or a server that drops it are too many."""


class S3Store(ArtifactStore):
    """A store under a prefix of a bucket, on any server that honours If-None-Match and If-Match.

    Every write has a name of its own, and every object the trail of the writes that led to it. So whatever the server
    answers, and if it does not, what stands there then says whether a write took place, even if others have followed.
    A refusal alone does not: a request may have come twice, and what is refused is the second.
    """

    def __init__(self, bucket: str, prefix: str = "", access: S3Access | None = None) -> None:
        if not _BUCKET.fullmatch(bucket):
            raise ValueError(f"{bucket!r} is not a bucket name: 3 to 63 of a-z, 0-9, '.' and '-'")
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self.url = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._client = S3Client(bucket, self.url, access or S3Access())
        # Asked first because some servers make a missing bucket on the first write, a typing error included.
        with self._client.explained(""):
            repeated(lambda: self._client.once("list_objects_v2", MaxKeys=1), _IMPATIENT)
        self._probe()

    def create(self, key: str, data: bytes) -> str:
        version, _ = self._put(check_key(key), data, None)
        if version is None:
            raise AlreadyExists(f"{self.url}/{key} already exists, or is a folder of others")
        return version

    def read(self, key: str) -> Versioned:
        with self._client.explained(check_key(key)):
            data, answer = repeated(lambda: self._client.once_with_body(Key=self._prefix + key))
            return Versioned(data, answer["ETag"])

    def swap(self, key: str, data: bytes, expected: str) -> str:
        found = self._head(check_key(key))
        version, standing = (None, found) if _version(found) != expected else self._put(key, data, found)
        if version is None and standing is None:
            raise ArtifactNotFound(f"{self.url}/{key}: no such object")
        if version is None:
            raise Conflict(f"{self.url}/{key} is at version {_version(standing)}, not {expected}: read it again")
        return version

    def list(self, prefix: str = "") -> Sequence[str]:
        full = self._prefix + check_prefix(prefix)
        pages = self._client.pages(prefix, "list_objects_v2", Prefix=full)
        keys = [cast(str, item["Key"]) for page in pages for item in page.get("Contents", [])]
        names = [key.removeprefix(self._prefix) for key in keys]
        return sorted(name for name in names if not name.startswith("."))

    def clear_unfinished(self, older_than: timedelta) -> int:
        oldest = datetime.now(UTC) - older_than
        pages = self._client.pages("", "list_multipart_uploads", Prefix=self._prefix)
        left = [upload for page in pages for upload in page.get("Uploads", []) if upload["Initiated"] < oldest]
        for upload in left:
            with suppress(ArtifactNotFound):
                self._client.asked("", "abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
        return len(left)

    def _probe(self) -> None:
        """Refuse a server that ignores conditions: two promotions could both win on it, unseen."""
        probe = {"Key": self._prefix + _PROBE}
        self._holds_to(_condition(None), "put_object", **probe, Body=b"1")  # stays: later sessions find it there
        for condition in (_condition(None), _condition('"0"')):
            if not self._holds_to(condition, "put_object", **probe, Body=b"2"):
                raise StoreRefused(
                    f"{self.url}: the server ignores {_HEADER[next(iter(condition))]} on writes, so two promotions"
                    " could both win; use AWS S3, MinIO, SeaweedFS or a folder"
                )
        upload = {**probe, "UploadId": self._client.asked("", "create_multipart_upload", **probe)["UploadId"]}
        part = self._client.asked("", "upload_part", **upload, PartNumber=1, Body=b"3")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        if self._holds_to(_condition(None), "complete_multipart_upload", **upload, MultipartUpload=parts):
            give_up(self._client, **upload)
        else:
            logger.warning("%s completes uploads whatever stands there; blobs may be written twice", self.url)

    def _holds_to(self, condition: Mapping[str, str], operation: str, **arguments: object) -> bool:
        """Whether the server refuses a write for its condition."""
        with self._client.explained(""):
            try:
                repeated(lambda: self._client.once(operation, **arguments, **condition))
            except Refused as error:
                if error.status in (404, 412) and error.code != "NoSuchBucket":
                    return True
                raise
        return False

    def _put(self, key: str, data: bytes, found: Answer | None) -> tuple[str | None, Answer | None]:
        """Write over the object that was found, or over nothing: what `_settled` says."""
        writer, expected = new_writer(), _version(found)
        place = {
            "Key": self._prefix + key,
            "Metadata": Trail.of(found).then(expected, writer).metadata,
            "ChecksumSHA256": checksum(data),
            **_condition(expected),
        }
        return self._settled(key, writer, expected, lambda: self._client.once("put_object", Body=data, **place))

    def _settled(
        self, key: str, writer: str, expected: str | None, send: Callable[[], Answer]
    ) -> tuple[str | None, Answer | None]:
        """Send a write until it took place or never can: the version written or None, and what stands in its way.

        What stands there is looked at before anything is sent again, whatever the answer was and if there was none.
        """
        unknown = False
        problem: Lost | Refused | None = None
        for pause in (*pauses(), 0.0):
            version, problem = self._tried(key, send)
            if version:
                return version, None
            unknown |= isinstance(problem, Lost) and problem.sent
            found = self._looked_at(key, unknown or isinstance(problem, Refused))
            trail = Trail.of(found)
            if found and (version := trail.version_by(writer, found["ETag"])):
                return version, None
            if _version(found) != expected:
                if (unknown or trail.steps) and not trail.replaces(expected):
                    raise OutcomeUnknown(
                        f"{self.url}/{key}: the answer to a write was lost, and so many have written since that nobody"
                        " can tell whether it took place; look what stands there before you write again"
                    )
                return None, found
            if isinstance(problem, Refused) and problem.code == "NoSuchUpload":
                raise problem
            logger.info("writing %s/%s again in %.1f s: %s", self.url, key, pause, problem)
            time.sleep(pause)
        if unknown:
            raise OutcomeUnknown(f"{self.url}/{key}: no answer to a write ({problem}); look later if it took place")
        if isinstance(problem, Lost):
            raise ConnectionError(f"{self.url}/{key}: {problem}; check the endpoint and the network")
        raise Conflict(f"{self.url}/{key}: other writes were in progress at every attempt ({problem}); try again")

    def _tried(self, key: str, send: Callable[[], Answer]) -> tuple[str | None, Lost | Refused | None]:
        """The version written, or what kept it from being written as far as one can tell."""
        with self._client.explained(key):
            try:
                return send()["ETag"], None
            except Lost as error:
                return None, error
            except Refused as error:
                if error.status not in (404, 409, 412) or error.code == "NoSuchBucket":
                    raise
                return None, error

    def _looked_at(self, key: str, sent: bool) -> Answer | None:
        try:
            return self._head(key)
        except ConnectionError as error:
            if sent:
                raise OutcomeUnknown(f"{error}; a write was sent before, look later whether it took place") from error
            raise

    def _upload(self, key: str, source: Source) -> None:
        """A blob's name is its content, so a rival's blob is as good as ours; one that was cut short is replaced."""
        problem: Exception | None = None
        for pause in (*pauses(_UPLOADS), 0.0):
            found = self._head(key)
            if found and found["ContentLength"] == source.blob.size:
                return
            send = self._upload_whole if source.blob.size <= PART else self._upload_parts
            try:
                if send(key, source, found):
                    return
            except (Conflict, OutcomeUnknown, Refused) as error:
                problem = error
                logger.info("sending %s/%s again in %.1f s: %s", self.url, key, pause, problem)
                time.sleep(pause)
        raise ConnectionError(f"{self.url}/{key}: sent {_UPLOADS} times and not there ({problem}); try again later")

    def _upload_whole(self, key: str, source: Source, found: Answer | None) -> bool:
        data = source.path.read_bytes()
        source.check(hashlib.sha256(data).hexdigest())
        version, _ = self._put(key, data, found)
        return version is not None

    def _upload_parts(self, key: str, source: Source, found: Answer | None) -> bool:
        writer, expected = new_writer(), _version(found)
        metadata = Trail.of(found).then(expected, writer).metadata
        with sent_in_parts(self._client, self._prefix + key, source.path, metadata) as upload:
            source.check()
            arguments = {**upload, **_condition(expected)}
            version, _ = self._settled(
                key, writer, expected, lambda: self._client.once("complete_multipart_upload", **arguments)
            )
            if version is None:
                give_up(self._client, Key=upload["Key"], UploadId=upload["UploadId"])
        return version is not None

    def _pieces(self, key: str) -> Iterator[bytes]:
        return pieces(self._client, self._prefix + key, key)

    def _size(self, key: str) -> int | None:
        found = self._head(key)
        return found["ContentLength"] if found else None

    def _head(self, key: str) -> Answer | None:
        try:
            return self._client.asked(key, "head_object", Key=self._prefix + key)
        except ArtifactNotFound:
            return None

    def _discard(self, key: str) -> None:
        self._client.asked(key, "delete_object", Key=self._prefix + key)


_HEADER = {"IfNoneMatch": "If-None-Match", "IfMatch": "If-Match"}


def _condition(expected: str | None) -> dict[str, str]:
    """What makes a write replace only that version, or nothing."""
    return {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}


def _version(found: Answer | None) -> str | None:
    return found["ETag"] if found else None
