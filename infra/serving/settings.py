"""What a server process is told at its start. It knows nothing of the served model, which brings its own recipe."""

import ipaddress
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, model_validator

from infra.serving.jobs.table import Track
from model.config import Config, Positive

Seconds = Annotated[float, Field(gt=0)]


class ServerSettings(Config):
    engine: Path
    """Engine folder to serve."""
    database_url: str
    """SQLAlchemy URL of the job database, like `sqlite:///runs/serving/jobs.db`."""
    store_url: str
    """Where videos and uploaded images are kept: a folder or `s3://bucket/prefix`."""
    track: Track = "stable"
    """A canary makes only the videos that it accepted itself, and hands over what it cannot make (docs/release.md)."""
    model_name: str | None = None
    """Name clients ask for; `stiv-<stage>` if none is given."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[SecretStr, ...] = ()
    """Bearer keys as they are; without these and `keys_file` the server answers loopback only."""
    keys_file: Path | None = None
    """TOML with a `[[key]]` for each client: name, sha256, and what it may do."""
    requests_per_minute: Positive = 3000
    """Of one client, where its key does not say; ten seconds' worth may come at once."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names this server is reached by, where it serves without keys; other Host headers are refused then."""
    image_hosts: tuple[str, ...] = ()
    """Hosts that an https `image_url` may be fetched from; none by default, so nothing is fetched."""
    body_timeout_s: Seconds = 60.0
    """How long a request's body may take to arrive."""
    head_timeout_s: Seconds = 10.0
    """How long a connection may take to say what it wants."""
    stall_timeout_s: Seconds = 60.0
    """How long a client may leave unread what it is sent."""
    max_connections: Positive = 4096
    """Open at once; beyond it a connection is answered 503 and closed."""
    webhook_url: str | None = None
    """Told of every video that is completed or failed, if its key names no URL of its own."""
    webhook_secret: SecretStr | None = None
    """What webhooks are signed with: `whsec_` and base64."""
    moderation_url: str | None = None
    """An endpoint like OpenAI's /v1/moderations, asked about prompts, uploads and finished frames."""
    moderation_token: SecretStr | None = None
    moderation_command: tuple[str, ...] = ()
    """Or a program that is asked; see `infra.serving.safety.moderation`."""
    embed_prompt: bool = False
    """Whether files say their prompt beside the model that made them."""
    max_rows: Positive = 4
    """Videos denoised at the same time."""
    max_queued: Positive = 64
    """Videos that may wait; beyond it a request is answered 429."""
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
        """Settings with the secrets and the endpoints of the environment: STIV_ and a field's name in capitals.

        STIV_API_KEYS is separated by commas. STIV_DATABASE_URL, STIV_VIDEOS_URL and STIV_TRACK stand in place of those
        in `settings`.
        """
        keys = [key.strip() for key in environment.get("STIV_API_KEYS", "").split(",")]
        names = ("keys_file", "webhook_url", "webhook_secret", "moderation_url", "moderation_token", "embed_prompt")
        variables = {name: f"STIV_{name.upper()}" for name in names}
        places = {"database_url": "STIV_DATABASE_URL", "store_url": "STIV_VIDEOS_URL", "track": "STIV_TRACK"}
        said: dict[str, Any] = {
            name: environment[key] for name, key in (variables | places).items() if environment.get(key)
        }
        command = shlex.split(environment.get("STIV_MODERATION_COMMAND", ""))
        own = {"api_keys": [key for key in keys if key], "moderation_command": command}
        return cls.model_validate({**own, **settings, **said})

    @model_validator(mode="after")
    def _open_to_the_world_needs_keys(self) -> Self:
        if not self.needs_keys and not is_loopback(self.host):
            raise ValueError(
                f"host '{self.host}' can be reached from other machines, but no API key is set:"
                " set STIV_KEYS_FILE or STIV_API_KEYS, or serve on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> Self:
        if self.webhook_url is not None and self.webhook_secret is None:
            raise ValueError("webhook_url is set without webhook_secret: receivers could not tell who calls")
        return self

    @property
    def moderates(self) -> bool:
        return self.moderation_url is not None or bool(self.moderation_command)

    @property
    def needs_keys(self) -> bool:
        return bool(self.api_keys) or self.keys_file is not None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
