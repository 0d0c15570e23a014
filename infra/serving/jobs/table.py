"""The tables of the job database, and the plain values handed out of them.

It owns columns and what they mean; it knows nothing of transactions (`store`), nor of how a schema gets into a
database (`database`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import JSON, Float, ForeignKey, Index, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from infra.serving.limits import ENGINE_ROWS, VideoRequest, cost_key

State = Literal["queued", "in_progress", "completed", "failed", "deleted"]
Order = Literal["asc", "desc"]
Track = Literal["stable", "canary"]
"""Which release a server belongs to; a job is made by the track that accepted it, until stable takes it over."""


class Base(DeclarativeBase):
    pass


class Schema(Base):
    """One row: which version of these tables the database holds."""

    __tablename__ = "video_schema"

    version: Mapped[int] = mapped_column(primary_key=True)


class Job(Base):
    """One row; instances handed out are detached snapshots, without their preview."""

    __tablename__ = "video_jobs"
    __table_args__ = (
        UniqueConstraint("client", "idempotency_key"),
        Index("ix_video_jobs_queue", "state", "priority", "sequence"),
        Index("ix_video_jobs_notify", "notify_at"),
        {"sqlite_autoincrement": True},  # a number is never given again, so pages stay stable
    )

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of creation; pages and the queue follow it."""
    id: Mapped[str] = mapped_column(String(40), unique=True)
    state: Mapped[str] = mapped_column(String(16))
    track: Mapped[str] = mapped_column(String(16))
    """Whose workers may lease it, see `Track`."""
    model: Mapped[str] = mapped_column(String(100))
    request_json: Mapped[dict[str, Any]] = mapped_column(JSON)
    inputs: Mapped[dict[str, str]] = mapped_column(JSON)
    """Role ("image", "video") -> digest in the artifact store."""
    client: Mapped[str] = mapped_column(String(64))
    """Public id of the API key; empty where the server has no keys."""
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_digest: Mapped[str] = mapped_column(String(64))
    remixed_from: Mapped[str | None] = mapped_column(String(40))

    priority: Mapped[int]
    """-10 to 10, higher first."""
    deadline_at: Mapped[float | None] = mapped_column(Float)
    engine_rows: Mapped[int]
    """Rows of an engine call: one a pass of the guidance."""
    denoise_steps: Mapped[int]
    cost_key: Mapped[str] = mapped_column(String(40))
    """See `limits.cost_key`."""

    progress: Mapped[int]
    estimated_done_at: Mapped[float | None] = mapped_column(Float)
    preview: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)
    """A small WebP of the latest estimate of the video."""
    attempts: Mapped[int]
    """How often it was leased."""
    losses: Mapped[int]
    """Workers lost with it since it last came forward."""
    kept_step: Mapped[int]
    """Denoise steps whose latents are kept, see `KeptLatents`."""
    owner: Mapped[str | None] = mapped_column(String(200), index=True)
    heartbeat_at: Mapped[float | None] = mapped_column(Float)

    engine: Mapped[str | None] = mapped_column(String(64))
    """Digest of the engine that made the video."""
    artifacts: Mapped[dict[str, str]] = mapped_column(JSON)
    """Variant -> digest in the artifact store."""
    error_code: Mapped[str | None] = mapped_column(String(60))
    error_message: Mapped[str | None] = mapped_column(String(2000))
    notify_at: Mapped[float | None] = mapped_column(Float)
    """When the end of this job is to be told next; None once it was told, or where nobody wants to know."""
    notify_attempts: Mapped[int]

    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    completed_at: Mapped[float | None] = mapped_column(Float)
    ended_at: Mapped[float | None] = mapped_column(Float)
    """When it was completed, failed or deleted."""
    expires_at: Mapped[float | None] = mapped_column(Float)
    """Until when the video is kept."""

    @property
    def request(self) -> VideoRequest:
        return VideoRequest.model_validate(self.request_json)


class Latents(Base):
    """How far a running job has come, so that another worker can go on from there."""

    __tablename__ = "video_latents"

    job_id: Mapped[str] = mapped_column(ForeignKey("video_jobs.id", ondelete="CASCADE"), primary_key=True)
    engine: Mapped[str] = mapped_column(String(64))
    step: Mapped[int]
    data: Mapped[bytes] = mapped_column(LargeBinary)


class FileUse(Base):
    """A blob of the artifact store that somebody needs; one that nobody needs any more is deleted."""

    __tablename__ = "video_files"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(60), primary_key=True)
    """A job's id, or `keeping/...` while the job that will use it is not made or not completed yet."""
    expires_at: Mapped[float | None] = mapped_column(Float, index=True)


class ReplicaState(Base):
    """What a replica says of itself, for the others to answer with."""

    __tablename__ = "serving_state"

    replica: Mapped[str] = mapped_column(String(200), primary_key=True)
    updated_at: Mapped[float] = mapped_column(Float)
    said: Mapped[dict[str, Any]] = mapped_column(JSON)


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life of one running job."""

    progress: int
    """Percent."""
    estimated_done_at: float | None = None
    preview: bytes | None = None
    """None leaves the one that is there."""


@dataclass(frozen=True, slots=True)
class KeptLatents:
    """Latents after `step` denoise steps by the engine of that digest; `data` are safetensors."""

    engine: str
    step: int
    data: bytes


@dataclass(frozen=True, slots=True)
class JobPage:
    jobs: list[Job]
    has_more: bool


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a client asks for."""

    request: VideoRequest
    model: str
    inputs: Mapping[str, str]
    """Role -> digest, kept by `JobFiles`."""
    client: str = ""
    priority: int = 0
    deadline_at: float | None = None
    idempotency_key: str | None = None
    request_digest: str = ""
    """Of what the client sent; equal to that of a first try with the same key, if this is a second one."""
    remixed_from: str | None = None

    def row(self, job_id: str, now: float, track: Track = "stable") -> Job:
        request = self.request
        return Job(
            id=job_id,
            state="queued",
            track=track,
            model=self.model,
            request_json=request.model_dump(mode="json"),
            inputs=dict(self.inputs),
            client=self.client,
            idempotency_key=self.idempotency_key,
            request_digest=self.request_digest,
            remixed_from=self.remixed_from,
            priority=self.priority,
            deadline_at=self.deadline_at,
            engine_rows=ENGINE_ROWS[request.guidance],
            denoise_steps=request.num_inference_steps,
            cost_key=cost_key(request),
            **{"progress": 0, "attempts": 0, "losses": 0, "kept_step": 0, "notify_attempts": 0, "artifacts": {}},
            created_at=now,
        )
