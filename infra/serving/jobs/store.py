"""Durable video jobs: every state a job has ever been acknowledged in is committed to the database first.

It owns the transitions of jobs, their leases and the outbox of notifications; it knows nothing of HTTP, of networks or
of where videos are kept. A job is leased by one worker at a time and found again when that worker dies.
"""

import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import CursorResult, Result, delete, func, select, update
from sqlalchemy.orm import Session, undefer

from infra.serving.jobs.database import Database
from infra.serving.jobs.owner import is_dead
from infra.serving.jobs.table import (
    Beat,
    FileUse,
    Job,
    JobPage,
    KeptLatents,
    Latents,
    NewJob,
    Order,
    ReplicaState,
    State,
    Track,
)
from infra.serving.scheduling.order import QueuedJob
from infra.serving.scheduling.simulator import Arrival

_CREATE_LOCK = "stiv/create"
_WEIGHED = (Job.engine_rows, Job.created_at, Job.client, Job.priority, Job.deadline_at)
"""What a `QueuedJob` says beside its id, its bucket and its steps."""


class JobNotFound(LookupError):
    """No such job, or it was deleted."""


class QueueFull(Exception):
    """As many jobs wait as the server takes."""


class QuotaExceeded(Exception):
    """A client has as many jobs queued or running as it may have."""


class IdempotencyConflict(Exception):
    """The idempotency key was used for another request."""


class JobStore:
    """Jobs behind a database URL: `sqlite:///FILE`, or `postgresql://USER@HOST/NAME` shared by all replicas."""

    def __init__(self, url: str, *, notifies: bool = False, max_losses: int = 3, track: Track = "stable") -> None:
        """`notifies`: ended jobs enter the outbox. A job that lost `max_losses` workers at one place is given up.

        Jobs made here are of `track`, and only those wait here; see `hand_over`.
        """
        self.database = Database(url)
        self.notifies = notifies
        self.max_losses = max_losses
        self.track: Track = track

    def create(self, new: NewJob, *, max_queued: int, max_active: int | None = None) -> Job:
        """A queued job, on disk when this returns; the one that stands if its client sent this before.

        Raises:
            IdempotencyConflict: its key stands for another request. QueueFull: `max_queued` wait.
            QuotaExceeded: its client has `max_active` jobs queued or running.
        """
        with self.database.write() as session:
            # One at a time, so that limits hold and a page never misses a job that is committed late.
            self.database.lock(session, _CREATE_LOCK)
            standing = _standing(session, new)
            if standing is not None:
                return standing
            if _count(session, ("queued",)) >= max_queued:
                raise QueueFull(f"{max_queued} videos are waiting already")
            if max_active is not None and _count(session, ("queued", "in_progress"), new.client) >= max_active:
                raise QuotaExceeded(f"this key has {max_active} videos queued or running already")
            job = new.row(f"video_{uuid.uuid4().hex}", time.time(), self.track)
            session.add(job)
            for digest in set(new.inputs.values()):
                session.add(FileUse(digest=digest, holder=job.id))
        return job

    def get(self, job_id: str) -> Job:
        with self.database.read() as session:
            return _existing(session, job_id)

    def preview(self, job_id: str) -> bytes | None:
        """A small WebP of how far the video has come."""
        with self.database.read() as session:
            return _existing(session, job_id, with_preview=True).preview

    def page(self, *, after: str | None, limit: int, order: Order, client: str | None = None) -> JobPage:
        """Jobs of `client`, or of all."""
        with self.database.read() as session:
            mine = () if client is None else (Job.client == client,)
            query = select(Job).where(Job.state != "deleted", *mine)
            if after is not None:  # a deleted job still marks its place, so deleting while paging loses nothing
                last = session.scalar(select(Job.sequence).where(Job.id == after, *mine))
                if last is None:
                    raise JobNotFound(after)
                query = query.where(Job.sequence > last if order == "asc" else Job.sequence < last)
            query = query.order_by(Job.sequence.asc() if order == "asc" else Job.sequence.desc()).limit(limit + 1)
            jobs = list(session.scalars(query))
        return JobPage(jobs[:limit], len(jobs) > limit)

    def delete(self, job_id: str) -> None:
        """Cancel or forget a job: what its request and video said is gone from the row, the id stays used."""
        with self.database.write() as session:
            job = _existing(session, job_id, locked=True)
            job.request_json, job.inputs, job.artifacts = {}, {}, {}
            job.error_message, job.preview, job.idempotency_key, job.notify_at = None, None, None, None
            _end(session, job, "deleted", files_until=time.time())

    def waiting(self, limit: int) -> list[QueuedJob]:
        """Queued jobs of this track as the scheduler weighs them; of too many, the urgent and then the old ones."""
        steps_left = Job.denoise_steps - Job.kept_step
        queued = select(Job.id, Job.cost_key, steps_left, *_WEIGHED)
        queued = queued.where(Job.state == "queued", Job.track == self.track)
        with self.database.read() as session:
            found = session.execute(queued.order_by(Job.priority.desc(), Job.sequence).limit(limit))
            return [QueuedJob(*values) for values in found]

    def history(self, since: float) -> list[Arrival]:
        """Jobs made since then, whatever became of them, as they came."""
        made = select(Job.id, Job.cost_key, Job.denoise_steps, *_WEIGHED).where(Job.created_at >= since)
        with self.database.read() as session:
            return [Arrival(*values) for values in session.execute(made.order_by(Job.sequence))]

    def lease(self, owner: str, ids: Sequence[str]) -> list[Job]:
        """Those of `ids` that are still queued, in that order, now in progress and held by `owner`."""
        if not ids:
            return []
        queued = select(Job).where(Job.id.in_(ids), Job.state == "queued").with_for_update(skip_locked=True)
        with self.database.write() as session:
            jobs = list(session.scalars(queued))
            now = time.time()
            for job in jobs:
                job.state, job.owner, job.heartbeat_at, job.started_at = "in_progress", owner, now, now
                job.attempts += 1
        return sorted(jobs, key=lambda job: ids.index(job.id))

    def held(self, owner: str) -> set[str]:
        """Ids that `owner` still holds; a cancelled or expired job is missing."""
        query = select(Job.id).where(Job.owner == owner, Job.state == "in_progress")
        with self.database.read() as session:
            return set(session.scalars(query))

    def heartbeat(self, owner: str, beats: Mapping[str, Beat]) -> None:
        """Keep the leases of these jobs alive and publish how far they are."""
        with self.database.write() as session:
            for job_id, beat in sorted(beats.items()):
                values: dict[str, Any] = {
                    "progress": beat.progress,
                    "heartbeat_at": time.time(),
                    "estimated_done_at": beat.estimated_done_at,
                }
                if beat.preview is not None:
                    values["preview"] = beat.preview
                _update_held(session, job_id, owner, values)

    def keep_latents(self, owner: str, kept: Mapping[str, KeptLatents]) -> None:
        """Remember how far these jobs are; whoever leases them next goes on from there."""
        with self.database.write() as session:
            for job_id, latents in sorted(kept.items()):
                if _update_held(session, job_id, owner, {"kept_step": latents.step, "losses": 0}):
                    session.merge(Latents(job_id=job_id, engine=latents.engine, step=latents.step, data=latents.data))

    def latents(self, job_id: str) -> KeptLatents | None:
        with self.database.read() as session:
            kept = session.get(Latents, job_id)
            return None if kept is None else KeptLatents(kept.engine, kept.step, kept.data)

    def complete(
        self, job_id: str, owner: str, artifacts: Mapping[str, str], *, engine: str, retention_s: float
    ) -> bool:
        """False if `owner` lost the job meanwhile (cancelled, or leased anew)."""
        now = time.time()
        with self.database.write() as session:
            job = _held(session, job_id, owner)
            if job is None:
                return False
            job.progress, job.artifacts, job.engine, job.estimated_done_at = 100, dict(artifacts), engine, None
            job.completed_at, job.expires_at = now, now + retention_s
            job.notify_at = now if self.notifies else None
            for digest in set(artifacts.values()):
                session.merge(FileUse(digest=digest, holder=job_id))
            session.flush()
            _end(session, job, "completed", files_until=now + retention_s)
        return True

    def fail(self, job_id: str, owner: str, *, code: str, message: str) -> bool:
        """False if `owner` lost the job meanwhile."""
        with self.database.write() as session:
            job = _held(session, job_id, owner)
            if job is None:
                return False
            self._fail(session, job, code, message)
        return True

    def hand_over(self, job_id: str, owner: str) -> bool:
        """Queue a job that a canary could not make for stable, from its start; False if `owner` lost it meanwhile."""
        with self.database.write() as session:
            job = _held(session, job_id, owner)
            if job is None:
                return False
            job.kept_step, job.losses = 0, 0
            session.execute(delete(Latents).where(Latents.job_id == job_id))
            _queue_again(job)
        return True

    def hand_over_waiting(self, *, older_than_s: float = 0.0) -> int:
        """Queue for stable what has waited so long for a canary; a canary that leaves lets nobody wait for it."""
        waits = Job.state == "queued", Job.track != "stable", Job.created_at <= time.time() - older_than_s
        with self.database.write() as session:
            return _row_count(session.execute(update(Job).where(*waits).values(track="stable")))

    def release(self, owner: str, ids: Collection[str] | None = None) -> int:
        """Queue what `owner` holds again, or those of it; it was given back in good order, so no attempt is counted."""
        held = select(Job).where(Job.owner == owner, Job.state == "in_progress").with_for_update()
        with self.database.write() as session:
            jobs = list(session.scalars(held if ids is None else held.where(Job.id.in_(ids))))
            for job in jobs:
                _queue_again(job)
                job.attempts -= 1
        return len(jobs)

    def requeue_abandoned(self, *, lease_s: float) -> int:
        """Queue jobs again whose lease ran out, or whose process ran on this machine and is dead."""
        in_progress = select(Job).where(Job.state == "in_progress").with_for_update(skip_locked=True)
        with self.database.write() as session:
            jobs = [
                job
                for job in session.scalars(in_progress)
                if time.time() - (job.heartbeat_at or 0) > lease_s or is_dead(job.owner or "")
            ]
            for job in jobs:
                job.losses += 1
                if job.losses >= self.max_losses:
                    message = f"the worker was lost {job.losses} times while this video was generated"
                    self._fail(session, job, "worker_lost", message)
                else:
                    _queue_again(job)
        return len(jobs)

    def lease_notifications(self, limit: int, lease_s: float) -> list[Job]:
        """Ended jobs that are due to be told of; nobody else gets them for `lease_s`."""
        now = time.time()
        due = select(Job).where(Job.notify_at <= now).order_by(Job.notify_at).limit(limit)
        with self.database.write() as session:
            jobs = list(session.scalars(due.with_for_update(skip_locked=True)))
            for job in jobs:
                job.notify_at = now + lease_s
                job.notify_attempts += 1
        return jobs

    def notified(self, job_id: str) -> None:
        self._set(job_id, notify_at=None)

    def notify_later(self, job_id: str, at: float) -> None:
        self._set(job_id, notify_at=at)

    def publish_state(self, replica: str, said: Mapping[str, Any]) -> None:
        """What a replica says of itself, in place of what it said before."""
        with self.database.write() as session:
            session.merge(ReplicaState(replica=replica, updated_at=time.time(), said=dict(said)))

    def states(self, max_age_s: float) -> list[dict[str, Any]]:
        """What replicas said of themselves no longer ago than that."""
        query = select(ReplicaState.said).where(ReplicaState.updated_at >= time.time() - max_age_s)
        with self.database.read() as session:
            return list(session.scalars(query.order_by(ReplicaState.replica)))

    def forget(self, *, ended_before: float) -> int:
        """Remove rows of jobs that ended before then and have no file left, and replicas not heard of since."""
        with self.database.write() as session:
            session.execute(delete(ReplicaState).where(ReplicaState.updated_at < ended_before))
            has_files = select(FileUse.holder).where(FileUse.holder == Job.id).exists()
            old = delete(Job).where(Job.ended_at < ended_before, Job.notify_at.is_(None), ~has_files)
            return _row_count(session.execute(old))

    def count(self, state: State) -> int:
        with self.database.read() as session:
            return _count(session, (state,))

    def is_reachable(self) -> bool:
        return self.database.is_reachable()

    def close(self) -> None:
        self.database.close()

    def _fail(self, session: Session, job: Job, code: str, message: str) -> None:
        now = time.time()
        job.error_code, job.error_message, job.estimated_done_at = code, message.replace("\0", "")[:2000], None
        job.notify_at = now if self.notifies else None
        _end(session, job, "failed", files_until=now)

    def _set(self, job_id: str, *, notify_at: float | None) -> None:
        told = update(Job).where(Job.id == job_id, Job.state.in_(("completed", "failed")))
        with self.database.write() as session:
            session.execute(told.values(notify_at=notify_at))


def _standing(session: Session, new: NewJob) -> Job | None:
    """The job that the same client made with the same idempotency key."""
    if new.idempotency_key is None:
        return None
    same_key = Job.client == new.client, Job.idempotency_key == new.idempotency_key
    job = session.scalar(select(Job).where(*same_key))
    if job is not None and job.request_digest != new.request_digest:
        raise IdempotencyConflict(f"idempotency key '{new.idempotency_key}' was used for another request: {job.id}")
    return job


def _count(session: Session, states: Sequence[State], client: str | None = None) -> int:
    query = select(func.count()).select_from(Job).where(Job.state.in_(states))
    return session.scalar(query if client is None else query.where(Job.client == client)) or 0


def _existing(session: Session, job_id: str, *, locked: bool = False, with_preview: bool = False) -> Job:
    query = select(Job).where(Job.id == job_id, Job.state != "deleted")
    if with_preview:
        query = query.options(undefer(Job.preview))
    job = session.scalar(query.with_for_update() if locked else query)
    if job is None:
        raise JobNotFound(job_id)
    return job


def _held(session: Session, job_id: str, owner: str) -> Job | None:
    held = select(Job).where(Job.id == job_id, Job.owner == owner, Job.state == "in_progress")
    return session.scalar(held.with_for_update())


def _update_held(session: Session, job_id: str, owner: str, values: dict[str, Any]) -> bool:
    held = update(Job).where(Job.id == job_id, Job.owner == owner, Job.state == "in_progress")
    return bool(_row_count(session.execute(held.values(values))))


def _end(session: Session, job: Job, state: State, *, files_until: float) -> None:
    """Nobody holds it any more, its latents are dropped, its files are kept until then."""
    job.state, job.owner, job.ended_at = state, None, time.time()
    session.execute(delete(Latents).where(Latents.job_id == job.id))
    session.execute(update(FileUse).where(FileUse.holder == job.id).values(expires_at=files_until))


def _queue_again(job: Job) -> None:
    """For stable: what a canary leaves, whoever is sound takes."""
    job.track = "stable"
    job.state, job.owner, job.heartbeat_at, job.started_at, job.estimated_done_at = "queued", None, None, None, None
    job.progress = 100 * job.kept_step // job.denoise_steps


def _row_count(result: Result[Any]) -> int:
    return cast("CursorResult[Any]", result).rowcount
