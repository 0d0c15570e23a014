"""The way to an S3 server, and the only door to boto3.

It owns who asks, how long and how often, which failures are worth another try, and what each means in one sentence; it
knows nothing of the promise a store keeps.
"""

import logging
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import boto3.session  # pyright: ignore[reportMissingTypeStubs]
from botocore.config import Config as BotoConfig  # pyright: ignore[reportMissingTypeStubs]
from botocore.exceptions import (  # pyright: ignore[reportMissingTypeStubs]
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
)
from botocore.parsers import ResponseParserError  # pyright: ignore[reportMissingTypeStubs]

from infra.store.artifacts import ArtifactNotFound, StoreFull, StoreRefused

logger = logging.getLogger(__name__)

Answer = Mapping[str, Any]
T = TypeVar("T")

CONNECTIONS = 8
"""Parts of one file that are in flight at once."""
ATTEMPTS = 7
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds; seven attempts last six on average, ten at most, besides what the server takes: a restart is bridged."""

_FULL = {"InsufficientStorage", "QuotaExceeded", "StorageFull", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"}
_CREDENTIALS = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}
# What a request that was torn or spoilt on its way is refused with; sent again it is whole.
_SPOILT = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}


@dataclass(frozen=True, slots=True)
class S3Access:
    """Where the server is and who asks; what is None comes from boto3's own sources (environment, profile, role)."""

    endpoint: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    region: str | None = None
    timeout: float = 60.0
    """Seconds without a byte after which an answer counts as lost."""


class Lost(Exception):
    """No answer that says anything; `sent` is False where the request cannot have reached the server."""

    def __init__(self, problem: str, *, sent: bool = True) -> None:
        super().__init__(problem)
        self.sent = sent


class Refused(Exception):
    """The server answered, and said no."""

    def __init__(self, error: ClientError) -> None:
        answer = cast(dict[str, Any], error.response)
        self.status: int = answer["ResponseMetadata"]["HTTPStatusCode"]
        self.code: str = answer["Error"]["Code"]
        self.text: str = answer["Error"].get("Message") or str(error)
        self.server_time: str = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date", "unknown")
        super().__init__(f"{self.status} {self.code}: {self.text}")

    @property
    def is_full(self) -> bool:
        return self.status == 507 or self.code in _FULL

    @property
    def is_lost(self) -> bool:
        """A 500 may follow a write that took place, so it says no more than silence."""
        failed = self.status in (408, 429) or (self.status >= 500 and self.status not in (501, 505))
        return not self.is_full and (failed or self.code in _SPOILT)


def pauses(attempts: int = ATTEMPTS) -> Iterator[float]:
    """Seconds to wait before each further attempt: full jitter, so that rivals do not come back together."""
    for number in range(attempts - 1):
        yield random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**number))


def repeated(call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """The result of a call that may be made twice, tried again while answers are lost."""
    for pause in pauses(attempts):
        try:
            return call()
        except Lost as error:
            problem = error
        except Refused as error:
            if error.status != 409:
                raise
            problem = error
        logger.info("asking the store again in %.1f s: %s", pause, problem)
        time.sleep(pause)
    return call()


class S3Client:
    """One bucket on one server."""

    def __init__(self, bucket: str, url: str, access: S3Access) -> None:
        self.bucket = bucket
        self.url = url
        with self.explained(""):
            self._client = _connect(access)

    def once(self, operation: str, **arguments: object) -> Answer:
        """Ask once: the answer, or `Refused`, or `Lost`."""
        with _sorted_out():
            return getattr(self._client, operation)(Bucket=self.bucket, **arguments)

    def once_with_body(self, **arguments: object) -> tuple[bytes, Answer]:
        """The bytes of an object, or of a range of it, and what else the server said."""
        with _sorted_out():
            answer = self._client.get_object(Bucket=self.bucket, **arguments)
            return answer["Body"].read(), answer

    def asked(self, key: str, operation: str, **arguments: object) -> Answer:
        """Ask what may be asked twice; a failure is told in words."""
        with self.explained(key):
            return repeated(lambda: self.once(operation, **arguments))

    def pages(self, key: str, operation: str, **arguments: object) -> Iterator[Answer]:
        """The answers of an operation that tells its end by `IsTruncated`; a page that is lost is asked for again."""
        follow: dict[str, object] = {}
        while True:
            page = self.asked(key, operation, **arguments, **follow)
            yield page
            if not page.get("IsTruncated"):
                return
            if "NextContinuationToken" in page:
                follow = {"ContinuationToken": page["NextContinuationToken"]}
            else:
                follow = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    @contextmanager
    def explained(self, key: str) -> Generator[None]:
        """Say in one sentence what is wrong and what to do."""
        place = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except Refused as error:
            raise self._refusal(place, error) from error
        except Lost as error:
            raise ConnectionError(f"{place}: {error}; check the endpoint and the network") from error
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound) as error:
            raise StoreRefused(
                f"{self.url}: no credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error

    def _refusal(self, place: str, error: Refused) -> Exception:
        if error.code == "NoSuchBucket":
            return StoreRefused(f"{self.url}: there is no bucket '{self.bucket}'; create it or correct it")
        if error.status == 404:
            return ArtifactNotFound(f"{place}: no such object")
        if error.is_full:
            return StoreFull(f"{place}: the server has no space left ({error}); free some there, or raise its quota")
        if error.code == "RequestTimeTooSkewed":
            return StoreRefused(
                f"{place}: the clocks of this machine and of the server ({error.server_time}) are too far apart"
                " (RequestTimeTooSkewed); set this machine's clock, for example by NTP"
            )
        if error.status in (401, 403) or error.code in _CREDENTIALS:
            return StoreRefused(
                f"{place}: the server refused the credentials ({error.code}); check AWS_ACCESS_KEY_ID,"
                " AWS_SECRET_ACCESS_KEY and the rights on the bucket"
            )
        return StoreRefused(f"{place}: the server refused the request: {error}")


@contextmanager
def _sorted_out() -> Generator[None]:
    """Turn what boto3 raises into `Refused` or `Lost`; what is wrong on this side is left as it is."""
    try:
        yield
    except ClientError as error:
        refused = Refused(error)
        if refused.is_lost:
            raise Lost(f"the server failed with {refused}") from error
        raise refused from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError):
        raise
    except (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError) as error:
        raise Lost(str(error), sent=False) from error
    except (BotoCoreError, ResponseParserError) as error:
        raise Lost(str(error)) from error


def _connect(access: S3Access) -> Any:
    # A session of its own: boto3's default one is not safe across threads.
    session = boto3.session.Session()
    return session.client(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        "s3",
        endpoint_url=access.endpoint,
        aws_access_key_id=access.access_key,
        aws_secret_access_key=access.secret_key,
        region_name=access.region,
        config=BotoConfig(
            signature_version="s3v4",
            # Bodies carry a checksum the server holds them to; signing them too would hash them once more.
            s3={"payload_signing_enabled": False},
            # boto3 would repeat a write without looking whether it took place.
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=min(5.0, access.timeout),
            read_timeout=access.timeout,
            max_pool_connections=4 * CONNECTIONS,
            tcp_keepalive=True,
            # Digests are checked here, and some servers answer a range with the whole object's checksum.
            response_checksum_validation="when_required",
        ),
    )
