"""A store in an S3 bucket; the only door to boto3.

It owns how a server that honours conditions keeps the promise of `infra.store.artifacts`; it knows nothing of what is
stored.
"""

import logging
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from uuid import uuid4

import boto3.session  # pyright: ignore[reportMissingTypeStubs]
from boto3.exceptions import RetriesExceededError  # pyright: ignore[reportMissingTypeStubs]
from botocore.config import Config as BotoConfig  # pyright: ignore[reportMissingTypeStubs]
from botocore.exceptions import (  # pyright: ignore[reportMissingTypeStubs]
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)

from infra.store.artifacts import (
    AlreadyExists,
    ArtifactNotFound,
    ArtifactStore,
    Conflict,
    StoreRefused,
    Versioned,
    check_key,
    check_prefix,
)

logger = logging.getLogger(__name__)

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PROBE = ".probe"
_RACE_ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class S3Access:
    """Where the server is and who asks; what is None comes from boto3's own sources (environment, profile, role)."""

    endpoint: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    region: str | None = None


class _S3Client(Protocol):
    """The part of boto3's client that is used here."""

    def list_objects_v2(self, *, Bucket: str, MaxKeys: int) -> object: ...
    def put_object(self, *, Bucket: str, Key: str, Body: bytes, **condition: Any) -> Mapping[str, str]: ...
    def get_object(self, *, Bucket: str, Key: str) -> Mapping[str, Any]: ...
    def head_object(self, *, Bucket: str, Key: str) -> Mapping[str, Any]: ...
    def delete_object(self, *, Bucket: str, Key: str) -> object: ...
    def upload_fileobj(self, Fileobj: BinaryIO, Bucket: str, Key: str) -> None: ...
    def download_file(self, Bucket: str, Key: str, Filename: str) -> None: ...
    def get_paginator(self, operation_name: str) -> Any: ...


class S3Store(ArtifactStore):
    """A store under a prefix of a bucket, on any server that honours If-None-Match and If-Match."""

    def __init__(self, bucket: str, prefix: str = "", access: S3Access | None = None) -> None:
        if not _BUCKET.fullmatch(bucket):
            raise ValueError(f"{bucket!r} is not a bucket name: 3 to 63 of a-z, 0-9, '.' and '-'")
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self.url = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._client = _connect(access or S3Access())
        self._bulk = _connect(access or S3Access(), unsigned=True)
        self._probe()

    def create(self, key: str, data: bytes) -> str:
        version = self._put(check_key(key), data, IfNoneMatch="*")
        if version is None:
            raise AlreadyExists(f"{self.url}/{key} already exists, or is a folder of others")
        return version

    def read(self, key: str) -> Versioned:
        with self._explained(check_key(key)):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            return Versioned(answer["Body"].read(), answer["ETag"])

    def swap(self, key: str, data: bytes, expected: str) -> str:
        version = self._put(check_key(key), data, IfMatch=expected)
        if version is None:
            found = self._head(key)
            if found is None:
                raise ArtifactNotFound(f"{self.url}/{key}: no such object")
            raise Conflict(f"{self.url}/{key} is at version {found['ETag']}, not {expected}: read it again")
        return version

    def list(self, prefix: str = "") -> Sequence[str]:
        full = self._prefix + check_prefix(prefix)
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=full)
            keys = [cast(str, item["Key"]) for page in pages for item in page.get("Contents", [])]
        names = [key.removeprefix(self._prefix) for key in keys]
        return sorted(name for name in names if not name.startswith("."))

    def _probe(self) -> None:
        """Refuse a server that ignores conditions: two promotions could both win on it, unseen."""
        with self._explained(""):
            # Asked first because some servers make a missing bucket on the first write, a typing error included.
            self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)
        # The object stays, so an honest server answers the first of these in a later session already.
        ignored = self._put(_PROBE, b"1", IfNoneMatch="*") and self._put(_PROBE, b"2", IfNoneMatch="*")
        if ignored or self._put(_PROBE, b"3", IfMatch='"0"'):
            raise StoreRefused(
                f"{self.url}: the server ignores {'If-None-Match' if ignored else 'If-Match'} on writes, so two"
                " promotions could both win; use AWS S3, MinIO, SeaweedFS or a folder"
            )

    def _put(self, key: str, data: bytes, **condition: str) -> str | None:
        """The version written, or None where the condition did not hold."""
        writer = uuid4().hex
        place = {"Bucket": self._bucket, "Key": self._prefix + key}
        for attempt in range(_RACE_ATTEMPTS):
            with self._explained(key):
                try:
                    return self._client.put_object(**place, Body=data, Metadata={"writer": writer}, **condition)["ETag"]
                except ClientError as error:
                    status, code = _verdict(error)
                    if status not in (404, 409, 412) or code == "NoSuchBucket":
                        raise
                if status != 409:
                    # boto3 sends again when an answer is lost, and then the condition fails on our own write.
                    found = self._head(key)
                    return found["ETag"] if found and found["Metadata"].get("writer") == writer else None
            logger.info("another write of %s is in progress, attempt %d of %d", key, attempt + 1, _RACE_ATTEMPTS)
            time.sleep(0.05 * 2**attempt)
        raise Conflict(
            f"{self.url}/{key}: other writes were in progress at each of {_RACE_ATTEMPTS} attempts; try again"
        )

    def _head(self, key: str) -> Mapping[str, Any] | None:
        try:
            with self._explained(key):
                return self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except ArtifactNotFound:
            return None

    def _size(self, key: str) -> int | None:
        found = self._head(key)
        return found["ContentLength"] if found else None

    def _upload(self, key: str, path: Path) -> None:
        with self._explained(key), path.open("rb") as file:
            self._bulk.upload_fileobj(file, self._bucket, self._prefix + key)

    def _download(self, key: str, path: Path) -> None:
        with self._explained(key):
            self._client.download_file(self._bucket, self._prefix + key, str(path))

    def _discard(self, key: str) -> None:
        with self._explained(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    @contextmanager
    def _explained(self, key: str) -> Generator[None]:
        """Say what went wrong in words of ours; boto3 has retried by then what is worth it."""
        try:
            yield
        except ClientError as error:
            status, code = _verdict(error)
            if code == "NoSuchBucket":
                raise StoreRefused(
                    f"{self.url}: there is no bucket '{self._bucket}'; create it or correct it"
                ) from error
            if status == 404:
                raise ArtifactNotFound(f"{self.url}/{key}: no such object") from error
            if status in (401, 403):
                raise StoreRefused(
                    f"{self.url}/{key}: the server refused the credentials ({code}); check AWS_ACCESS_KEY_ID,"
                    " AWS_SECRET_ACCESS_KEY and the rights on the bucket"
                ) from error
            if status < 500 or status == 501:
                raise StoreRefused(f"{self.url}/{key}: the server refused the request: {error}") from error
            raise ConnectionError(
                f"{self.url}/{key}: the server failed with {status} {code}; try again later"
            ) from error
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
            raise StoreRefused(
                f"{self.url}: no credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        except (BotoCoreError, RetriesExceededError) as error:
            raise ConnectionError(f"{self.url}/{key}: {error}; check the endpoint and the network") from error


def _connect(access: S3Access, *, unsigned: bool = False) -> _S3Client:
    """`unsigned` leaves payloads out of the signature, as TLS does by itself: a blob's name is its digest already."""
    # A session of its own: boto3's default one is not safe across threads.
    session = boto3.session.Session()
    client: object = session.client(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        "s3",
        endpoint_url=access.endpoint,
        aws_access_key_id=access.access_key,
        aws_secret_access_key=access.secret_key,
        region_name=access.region,
        config=BotoConfig(
            signature_version="s3v4",
            s3={"payload_signing_enabled": False} if unsigned else None,
            retries={"mode": "standard", "total_max_attempts": 4},
            connect_timeout=5,
            read_timeout=60,
            # Digests are checked here, and some servers answer a range with the whole object's checksum.
            response_checksum_validation="when_required",
        ),
    )
    return cast(_S3Client, client)


def _verdict(error: ClientError) -> tuple[int, str]:
    answer = cast(dict[str, Any], error.response)
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]
