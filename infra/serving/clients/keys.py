"""API keys: who asks, what he may, and how often.

It owns the keys file, the comparison and the rate limit; it knows nothing of routes. A key itself is nowhere kept, only
its SHA-256: keys are 32 random bytes, so there is nothing to guess and no slow hash is needed.
"""

import hashlib
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, ValidationError, model_validator

from infra.serving.settings import ServerSettings
from model.config import Config, Positive

PREFIX = "sk-stiv-"
PRIORITY_BOUNDS = (-10, 10)
BURST_S = 10.0
"""A client that was quiet may send this many seconds' worth of requests at once."""
MOST_BUCKETS = 10_000

Priority = Annotated[int, Field(ge=PRIORITY_BOUNDS[0], le=PRIORITY_BOUNDS[1])]


class Client(Config):
    """Who a request comes from. Without keys there is one, whose name is empty."""

    name: Annotated[str, Field(max_length=64, pattern=r"^[\w.@-]*$")] = ""
    """Kept with each job; a client sees no other's videos."""
    max_active: Positive | None = None
    """Videos that may wait or run at the same time."""
    min_priority: Priority = -10
    max_priority: Priority = 10
    requests_per_minute: Positive | None = None
    """Of its own, in place of the server's."""
    webhook_url: str | None = None
    webhook_secret: SecretStr | None = None
    """`whsec_` and base64, as Standard Webhooks write it."""

    @model_validator(mode="after")
    def _agree(self) -> "Client":
        if self.min_priority > self.max_priority:
            raise ValueError(f"min_priority {self.min_priority} is above max_priority {self.max_priority}")
        if (self.webhook_url is None) != (self.webhook_secret is None):
            raise ValueError("webhook_url and webhook_secret go together; set both or none")
        return self

    def check_priority(self, priority: int) -> None:
        """ValueError if this client may not ask for it."""
        if not self.min_priority <= priority <= self.max_priority:
            raise ValueError(
                f"priority {priority} is outside {self.min_priority} to {self.max_priority}, which this key may use"
            )


class ApiKey(Client):
    """One entry of the keys file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key, in hex."""

    @model_validator(mode="after")
    def _is_named(self) -> "ApiKey":
        if not self.name:
            raise ValueError("name is missing: jobs are kept under it")
        return self


class KeyRing:
    """The keys a server knows; `find` takes as long for a wrong key as for a right one."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self.keys = tuple(keys)
        for name in ("name", "sha256"):
            values = [getattr(key, name) for key in self.keys]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"API keys: {name} '{twice[0][:40]}' stands there twice; each key has its own")

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        plain = (plain_key(key.get_secret_value()) for key in settings.api_keys)
        return cls([*plain, *(read_keys(settings.keys_file) if settings.keys_file else ())])

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, secret: bytes) -> ApiKey | None:
        given = hashlib.sha256(secret).hexdigest()
        found = [key for key in self.keys if secrets.compare_digest(given, key.sha256)]
        return found[0] if found else None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The `[[key]]` tables of a TOML file; ValueError names the file, the key and what is wrong."""
    try:
        tables = tomllib.loads(path.read_text()).get("key", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"the keys file {path} cannot be read: {error}") from None
    keys: list[ApiKey] = []
    for number, table in enumerate(tables, 1):
        try:
            keys.append(ApiKey.model_validate(table))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"the keys file {path}, key {number}: {field}: {first['msg']}") from None
    if not keys:
        raise ValueError(f"the keys file {path} holds no [[key]]; `stiv api-key NAME` prints one")
    return tuple(keys)


def plain_key(secret: str) -> ApiKey:
    """A key that was given as it is: its client is named by the start of its digest."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return ApiKey(name=f"key-{digest[:8]}", sha256=digest)


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, shown once, and its entry for the keys file."""
    secret = PREFIX + secrets.token_urlsafe(32)
    entry = ApiKey(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest())
    return secret, f'[[key]]\nname = "{entry.name}"\nsha256 = "{entry.sha256}"\n'


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a rate limit after a request."""

    limit: int
    remaining: int
    wait_s: float
    """Until the next request is allowed; 0 if this one was."""


class RateLimit:
    """A token bucket for each client, in this process: `per_minute` on average, ten seconds' worth at once."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, client: str, per_minute: int | None = None) -> Allowance:
        rate = (per_minute or self._per_minute) / 60
        burst = max(1.0, rate * BURST_S)
        with self._lock:
            now = self._clock()
            left, since = self._buckets.get(client, (burst, now))
            left = min(burst, left + (now - since) * rate)
            allowed = left >= 1.0
            left -= allowed
            self._keep(client, left, now)
        wait_s = 0.0 if allowed else (1.0 - left) / rate
        return Allowance(limit=per_minute or self._per_minute, remaining=int(left), wait_s=wait_s)

    def _keep(self, client: str, left: float, now: float) -> None:
        if len(self._buckets) >= MOST_BUCKETS and client not in self._buckets:
            self._buckets.clear()  # every bucket starts full again; better than growing for ever
        self._buckets[client] = (left, now)
