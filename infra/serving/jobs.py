"""Durable video jobs: every state a job has ever been acknowledged in is committed to the database first.

It owns the table, its transitions and leases; it knows nothing of HTTP, of networks or of where videos are kept.
A job is leased by one worker process at a time and found again when that process dies.
"""

import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import JSON, Connection, Engine, Float, String, create_engine, event, func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from infra.serving.limits import VideoRequest

State = Literal["queued", "in_progress", "completed", "failed", "deleted"]
Order = Literal["asc", "desc"]
MAX_ATTEMPTS = 3
"""A job whose worker died this often is given up: it may be what kills the worker."""

_PROCESS_TOKEN = uuid.uuid4().hex[:8]
"""Tells this process from an earlier one with its pid, which is 1 in every container."""


class JobNotFound(LookupError):
    """No such job, or it was deleted."""


class QueueFull(Exception):
    """As many jobs wait as the server takes."""


class Base(DeclarativeBase):
    pass


class Job(Base):
    """One row; instances handed out are detached snapshots."""

    __tablename__ = "video_jobs"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of creation; pages and the queue follow it."""
    id: Mapped[str] = mapped_column(String(40), unique=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    model: Mapped[str] = mapped_column(String(100))
    request_json: Mapped[dict[str, Any]] = mapped_column(JSON)
    image_digest: Mapped[str | None] = mapped_column(String(80))
    progress: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None] = mapped_column(String(200))
    heartbeat_at: Mapped[float | None] = mapped_column(Float)
    artifacts: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    """Variant -> digest in the artifact store."""
    error_code: Mapped[str | None] = mapped_column(String(60))
    error_message: Mapped[str | None] = mapped_column(String(2000))
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    completed_at: Mapped[float | None] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float)

    @property
    def request(self) -> VideoRequest:
        return VideoRequest.model_validate(self.request_json)


@dataclass(frozen=True, slots=True)
class JobPage:
    jobs: list[Job]
    has_more: bool


def new_owner() -> str:
    """Name of a lease holder in this process: host/pid/process token/own token."""
    return f"{socket.gethostname()}/{os.getpid()}/{_PROCESS_TOKEN}/{uuid.uuid4().hex[:8]}"


class JobStore:
    """Jobs behind a database URL: SQLite (`sqlite:///path`) or another that SQLAlchemy speaks."""

    def __init__(self, url: str) -> None:
        engine = create_engine(url)
        if engine.dialect.name == "sqlite":
            _use_write_ahead_log(engine)
        self.engine = engine
        self._read = sessionmaker(engine, expire_on_commit=False)
        self._write = sessionmaker(engine.execution_options(begin="IMMEDIATE"), expire_on_commit=False)
        Base.metadata.create_all(engine)

    def create(self, request: VideoRequest, *, model: str, image_digest: str | None, max_queued: int) -> Job:
        """A queued job, on disk when this returns."""
        with self._write.begin() as session:
            if _count(session, "queued") >= max_queued:
                raise QueueFull(f"{max_queued} videos are waiting already")
            job = Job(
                id=f"video_{uuid.uuid4().hex}",
                state="queued",
                model=model,
                request_json=request.model_dump(mode="json"),
                image_digest=image_digest,
                artifacts={},
                created_at=time.time(),
            )
            session.add(job)
        return job

    def get(self, job_id: str) -> Job:
        with self._read.begin() as session:
            return _existing(session, job_id)

    def page(self, *, after: str | None, limit: int, order: Order) -> JobPage:
        with self._read.begin() as session:
            query = select(Job).where(Job.state != "deleted")
            if after is not None:  # a deleted job still marks its place, so deleting while paging loses nothing
                last = session.scalar(select(Job.sequence).where(Job.id == after))
                if last is None:
                    raise JobNotFound(after)
                query = query.where(Job.sequence > last if order == "asc" else Job.sequence < last)
            query = query.order_by(Job.sequence.asc() if order == "asc" else Job.sequence.desc()).limit(limit + 1)
            jobs = list(session.scalars(query))
        return JobPage(jobs[:limit], len(jobs) > limit)

    def delete(self, job_id: str) -> None:
        """Cancel or forget a job: what its request and video said is gone from the row, the id stays used."""
        with self._write.begin() as session:
            job = _existing(session, job_id)
            job.state, job.owner = "deleted", None
            job.request_json, job.image_digest, job.artifacts, job.error_message = {}, None, {}, None

    def lease(self, owner: str, limit: int) -> list[Job]:
        """The longest waiting jobs, now in progress and held by `owner`."""
        if limit <= 0:
            return []
        with self._write.begin() as session:
            waiting = select(Job).where(Job.state == "queued").order_by(Job.sequence).limit(limit)
            jobs = list(session.scalars(waiting.with_for_update(skip_locked=True)))
            now = time.time()
            for job in jobs:
                job.state, job.owner, job.heartbeat_at, job.started_at = "in_progress", owner, now, now
                job.attempts += 1
        return jobs

    def held(self, owner: str) -> set[str]:
        """Ids that `owner` still holds; a cancelled or expired job is missing."""
        query = select(Job.id).where(Job.owner == owner, Job.state == "in_progress")
        with self._read.begin() as session:
            return set(session.scalars(query))

    def heartbeat(self, owner: str, progress: Mapping[str, int]) -> None:
        """Keep the leases of these jobs alive and publish how far they are (percent)."""
        with self._write.begin() as session:
            for job_id, percent in progress.items():
                _update_held(session, job_id, owner, {"progress": percent, "heartbeat_at": time.time()})

    def complete(self, job_id: str, owner: str, artifacts: Mapping[str, str], *, retention_s: float) -> bool:
        """False if `owner` lost the job meanwhile (cancelled, or leased anew)."""
        now = time.time()
        with self._write.begin() as session:
            return _update_held(
                session,
                job_id,
                owner,
                {
                    "state": "completed",
                    "owner": None,
                    "progress": 100,
                    "artifacts": dict(artifacts),
                    "completed_at": now,
                    "expires_at": now + retention_s,
                },
            )

    def fail(self, job_id: str, owner: str, *, code: str, message: str) -> bool:
        with self._write.begin() as session:
            return _update_held(
                session,
                job_id,
                owner,
                {"state": "failed", "owner": None, "error_code": code, "error_message": message[:2000]},
            )

    def release(self, owner: str) -> int:
        """Queue all that `owner` holds again; for a worker that stops in good order, so no attempt is counted."""
        with self._write.begin() as session:
            jobs = list(session.scalars(select(Job).where(Job.owner == owner, Job.state == "in_progress")))
            for job in jobs:
                _queue_again(job)
                job.attempts -= 1
        return len(jobs)

    def requeue_abandoned(self, *, lease_s: float) -> int:
        """Queue jobs again whose lease ran out, or whose process ran on this host and is dead."""
        with self._write.begin() as session:
            jobs = [
                job
                for job in session.scalars(select(Job).where(Job.state == "in_progress"))
                if time.time() - (job.heartbeat_at or 0) > lease_s or _is_dead(job.owner or "")
            ]
            for job in jobs:
                if job.attempts >= MAX_ATTEMPTS:
                    job.state, job.owner, job.error_code = "failed", None, "worker_lost"
                    job.error_message = f"the worker was lost {job.attempts} times while this video was generated"
                else:
                    _queue_again(job)
        return len(jobs)

    def count(self, state: State) -> int:
        with self._read.begin() as session:
            return _count(session, state)

    def is_reachable(self) -> bool:
        try:
            self.count("queued")
        except OperationalError:
            return False
        return True

    def close(self) -> None:
        self.engine.dispose()


def _count(session: Session, state: State) -> int:
    return session.scalar(select(func.count()).select_from(Job).where(Job.state == state)) or 0


def _existing(session: Session, job_id: str) -> Job:
    job = session.scalar(select(Job).where(Job.id == job_id, Job.state != "deleted"))
    if job is None:
        raise JobNotFound(job_id)
    return job


def _update_held(session: Session, job_id: str, owner: str, values: dict[str, Any]) -> bool:
    held = update(Job).where(Job.id == job_id, Job.owner == owner, Job.state == "in_progress")
    return bool(list(session.scalars(held.values(values).returning(Job.id))))


def _queue_again(job: Job) -> None:
    job.state, job.owner, job.heartbeat_at, job.started_at, job.progress = "queued", None, None, None, 0


def _is_dead(owner: str) -> bool:
    """Whether the process named in `owner` ran on this host and is gone."""
    host, pid, token, _ = owner.split("/")
    if host != socket.gethostname():
        return False
    if int(pid) == os.getpid():
        return token != _PROCESS_TOKEN
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _use_write_ahead_log(engine: Engine) -> None:
    """Readers never wait; a writer takes the lock when its transaction begins, so none fails half way."""

    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA busy_timeout=10000")

    def begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)
