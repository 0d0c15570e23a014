"""What the routes are given: the service behind them, who asks, and on what terms.

It owns authentication, the answers of the rate limit and the headers that say how; it knows nothing of what is asked.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Header, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from infra.serving.clients.keys import PRIORITY_BOUNDS, Client, KeyRing, RateLimit
from infra.serving.http.errors import ApiError
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.store import JobStore
from infra.serving.limits import ServedModel
from infra.serving.safety.moderation import Moderator
from infra.serving.settings import ServerSettings

ANYONE = Client()
"""Whoever asks a server without keys."""
VISIBLE_ASCII = r"^[\x21-\x7e]{1,255}$"
MAX_DEADLINE_S = 7 * 24 * 3600.0

_bearer = HTTPBearer(auto_error=False, description="A key of this server, where it has any")


@dataclass(frozen=True, slots=True)
class Service:
    settings: ServerSettings
    model: ServedModel
    jobs: JobStore
    files: JobFiles
    worker_state: Callable[[], str]
    """"ready" if it takes jobs."""
    on_created: Callable[[], None]
    """Called after a job was committed, to wake the worker."""
    on_deleted: Callable[[str], None]
    """Called after a job was deleted, to free its place at the next step."""
    retry_after_s: Callable[[], float]
    """When a full queue will have room again, as far as can be told."""
    is_stopping: Callable[[], bool]
    """Whether answers that never end by themselves should end now."""
    keys: KeyRing
    rate: RateLimit
    moderator: Moderator | None
    makers: CapacityLimiter
    """Of the threads that read uploads and make jobs; polls have others, so they never wait for an upload."""
    started_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client says beside the body: who he is, how urgent it is, whether he asked before."""

    client: Client
    priority: int = 0
    deadline_s: float | None = None
    idempotency_key: str | None = None


def service_of(request: Request) -> Service:
    return request.app.state.service


Serving = Annotated[Service, Depends(service_of)]


def authenticate(
    request: Request,
    response: Response,
    service: Serving,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Client:
    """The client; wrong keys are counted by their sender's address, so that trying keys is slow."""
    given = b"" if credentials is None else credentials.credentials.encode()
    client = service.keys.find(given) if service.keys else ANYONE
    address = request.client.host if request.client else ""
    bucket = f"key {client.name}" if client is not None and client.name else f"address {address}"
    allowance = service.rate.take(bucket, client.requests_per_minute if client else None)
    headers = {
        "x-ratelimit-limit-requests": str(allowance.limit),
        "x-ratelimit-remaining-requests": str(allowance.remaining),
    }
    if allowance.wait_s > 0:
        wait_s = math.ceil(allowance.wait_s)
        raise ApiError(
            429,
            f"at most {allowance.limit} requests a minute are answered; try again in {wait_s} s",
            code="rate_limit_exceeded",
            headers=headers | {"retry-after": str(wait_s)},
        )
    if client is None:
        message = "no API key was given" if credentials is None else "the API key is not known"
        raise ApiError(
            401,
            f"{message}; send 'Authorization: Bearer KEY' with a key of this server",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    response.headers.update(headers)
    return client


Caller = Annotated[Client, Depends(authenticate)]


def terms_of(
    client: Caller,
    x_priority: Annotated[
        int, Header(ge=PRIORITY_BOUNDS[0], le=PRIORITY_BOUNDS[1], description="Higher goes first")
    ] = 0,
    x_deadline_seconds: Annotated[
        float | None,
        Header(gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False, description="In how many seconds it should be there"),
    ] = None,
    idempotency_key: Annotated[
        str | None, Header(pattern=VISIBLE_ASCII, description="The same key and request give the same video")
    ] = None,
) -> Terms:
    return Terms(client, x_priority, x_deadline_seconds, idempotency_key)


Asked = Annotated[Terms, Depends(terms_of)]
