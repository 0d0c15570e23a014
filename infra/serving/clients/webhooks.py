"""Telling clients that a video has ended: signed webhooks out of the job table's outbox.

It owns what is told, to whom and when to try again; it knows nothing of how a job ends. An ended job stands in the
outbox until its receiver has acknowledged it, so a killed process loses none; a receiver may hear one twice, under one
id.
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import SecretStr

from infra import webhook
from infra.serving.clients.keys import KeyRing
from infra.serving.jobs.store import JobStore
from infra.serving.jobs.table import Job
from infra.serving.settings import ServerSettings
from monitoring import metrics

logger = logging.getLogger(__name__)

POLL_S = 1.0
AT_ONCE = 8
LEASE_S = 60.0
"""Longer than a receiver may take; then another process tries."""
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 6 * 3600.0
MAX_ATTEMPTS = 16
"""Over about a day and a half; then the message is given up, and logged."""


@dataclass(frozen=True, slots=True)
class Receiver:
    url: str
    secret: bytes


@dataclass(frozen=True, slots=True)
class Receivers:
    """Who is told of a client's videos: the receiver of its key, else the server's."""

    server: Receiver | None
    clients: Mapping[str, Receiver]

    @property
    def any(self) -> bool:
        return self.server is not None or bool(self.clients)

    def find(self, client: str) -> Receiver | None:
        return self.clients.get(client, self.server)


def receivers(settings: ServerSettings, keys: KeyRing) -> Receivers:
    """ValueError if a secret is none."""
    own = {key.name: _receiver(key.webhook_url, key.webhook_secret) for key in keys.keys}
    return Receivers(
        server=_receiver(settings.webhook_url, settings.webhook_secret),
        clients={name: receiver for name, receiver in own.items() if receiver is not None},
    )


def _receiver(url: str | None, secret: SecretStr | None) -> Receiver | None:
    if url is None or secret is None:
        return None
    return Receiver(url, webhook.read_secret(secret.get_secret_value()))


def message(job: Job) -> tuple[str, bytes]:
    """Id and body, the same at every try, in the shape of OpenAI's webhook events."""
    event_id = f"evt_{job.id.removeprefix('video_')}"
    event = {
        "id": event_id,
        "object": "event",
        "type": f"video.{job.state}",
        "created_at": int(job.ended_at or job.created_at),
        "data": {"id": job.id},
    }
    return event_id, json.dumps(event).encode()


def pause_s(attempts: int) -> float:
    """Before the next try: twice as long each time, with some chance so that not all come back at once."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(0, attempts - 1)) * random.uniform(0.8, 1.2)


class WebhookSender:
    """A thread that empties the outbox; every replica may run one, and each message is leased by one at a time."""

    def __init__(self, jobs: JobStore, find: Callable[[str], Receiver | None]) -> None:
        """`find` gives the receiver of a client's name, None where nobody wants to know."""
        self._jobs = jobs
        self._find = find
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stiv-webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is not told yet stays in the outbox."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def send_due(self) -> int:
        """Try what is due now, some at a time; how many were tried."""
        jobs = self._jobs.lease_notifications(AT_ONCE, LEASE_S)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._send, jobs))
        return len(jobs)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self.send_due():
                    continue
            except Exception:
                logger.exception("webhooks: the outbox cannot be read, trying again")
            self._stopping.wait(POLL_S)

    def _send(self, job: Job) -> None:
        receiver = self._find(job.client)
        if receiver is None:
            self._jobs.notified(job.id)
            return
        event_id, body = message(job)
        try:
            webhook.post(receiver.url, receiver.secret, event_id, body)
        except webhook.WebhookFailed as error:
            self._put_off(job, error)
        else:
            metrics.WEBHOOKS_TOTAL.labels("delivered").inc()
            self._jobs.notified(job.id)

    def _put_off(self, job: Job, error: Exception) -> None:
        if job.notify_attempts >= MAX_ATTEMPTS:
            metrics.WEBHOOKS_TOTAL.labels("given_up").inc()
            logger.error("webhook of job %s is given up after %s tries: %s", job.id, job.notify_attempts, error)
            self._jobs.notified(job.id)
            return
        metrics.WEBHOOKS_TOTAL.labels("failed").inc()
        wait_s = pause_s(job.notify_attempts)
        logger.warning("webhook of job %s is tried again in %.0f s: %s", job.id, wait_s, error)
        self._jobs.notify_later(job.id, time.time() + wait_s)
