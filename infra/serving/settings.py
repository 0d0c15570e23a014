"""What a server process is told at its start. It knows nothing of the served model, which brings its own recipe."""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, model_validator

from model.config import Config, Positive

Seconds = Annotated[float, Field(gt=0)]


class ServerSettings(Config):
    engine: Path
    """Engine folder to serve."""
    database_url: str
    """SQLAlchemy URL of the job database, like `sqlite:///runs/serving/jobs.db`."""
    store_url: str
    """Where videos and uploaded images are kept: a folder or `s3://bucket/prefix`."""
    model_name: str | None = None
    """Name clients ask for; `stiv-<stage>` if none is given."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[SecretStr, ...] = ()
    """Bearer keys; without any the server answers loopback only."""
    max_rows: Positive = 4
    """Videos denoised at the same time."""
    max_queued: Positive = 64
    """Videos that may wait; beyond it a request is answered 429."""
    retry_after_s: Positive = 10
    """What a refused client is told to wait."""
    lease_s: Seconds = 120.0
    """A job whose worker is not heard of for so long is given to another; longer than the slowest denoise step."""
    max_losses: Positive = 3
    """A job that lost so many workers without coming forward is given up: it may be what kills them."""
    keep_latents_steps: Positive = 10
    """A running video's latents are kept every so many denoise steps, so that another worker can go on from there."""
    drain_s: Annotated[float, Field(ge=0)] = 25.0
    """How long a stopping worker may go on with running videos before it hands them back."""
    retention_s: Seconds = 24 * 3600.0
    """How long a finished video can be downloaded."""
    history_s: Seconds = 30 * 24 * 3600.0
    """How long an ended job is remembered, and its idempotency key with it."""
    progress_every_s: Seconds = 0.25
    """A denoise step can take milliseconds; the database hears of progress this often, and that keeps leases alive."""
    preview_every_s: Annotated[float, Field(ge=0)] = 2.0
    """How often a running video's preview is drawn anew."""
    idle_poll_s: Seconds = 0.5
    """How often an idle worker looks for jobs that another replica accepted."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **settings: Any) -> Self:
        """Settings with the secrets and the endpoints of the environment.

        STIV_API_KEYS, separated by commas; STIV_DATABASE_URL and STIV_VIDEOS_URL in place of those in `settings`.
        """
        keys = [key.strip() for key in environment.get("STIV_API_KEYS", "").split(",")]
        places = {"database_url": "STIV_DATABASE_URL", "store_url": "STIV_VIDEOS_URL"}
        shared = {name: environment[variable] for name, variable in places.items() if environment.get(variable)}
        return cls.model_validate({"api_keys": [key for key in keys if key], **settings, **shared})

    @model_validator(mode="after")
    def _open_to_the_world_needs_keys(self) -> Self:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"host '{self.host}' can be reached from other machines, but no API key is set:"
                " set STIV_API_KEYS, or serve on 127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
