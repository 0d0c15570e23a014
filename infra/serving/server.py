"""The server process: one worker thread behind one HTTP app, started and stopped in good order.

It owns how the parts are put together; it knows nothing of what they do.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from export.profiles import ShapeProfile
from infra.serving.clients.keys import KeyRing, RateLimit
from infra.serving.clients.webhooks import WebhookSender, receivers
from infra.serving.http.app import create_app
from infra.serving.http.connection import uvicorn_config
from infra.serving.http.service import Service
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.store import JobStore
from infra.serving.limits import ServedModel, ServingLimits
from infra.serving.pipeline import VideoPipeline
from infra.serving.process import ServerProcess
from infra.serving.safety.moderation import open_moderator
from infra.serving.scheduling.outlook import Outlook
from infra.serving.settings import ServerSettings
from infra.serving.worker.worker import Worker
from infra.store.artifacts import ArtifactStore
from infra.store.location import open_store
from monitoring import logs

logger = logging.getLogger(__name__)

MAKERS = 8
"""Threads that read uploads and make jobs."""


def serve(settings: ServerSettings, *, reload: Callable[[], Path] | None = None) -> None:
    """Serve an engine folder until SIGTERM or SIGINT; running videos may finish for `drain_s`.

    On SIGHUP the folder that `reload` names is served from the next job on; the same one unless said.
    """
    logs.configure()
    pipeline = VideoPipeline.load(settings.engine)
    folder = reload or (lambda: settings.engine)
    server = make_server(settings, pipeline, reload=lambda: VideoPipeline.load(folder()))
    logger.info("serving %s on http://%s:%s", settings.engine, settings.host, settings.port)
    server.run()


def make_server(
    settings: ServerSettings,
    pipeline: VideoPipeline,
    *,
    limits: ServingLimits | None = None,
    reload: Callable[[], VideoPipeline] | None = None,
) -> ServerProcess:
    """A server of `pipeline`, ready to run; `limits` default to what its engine allows, `reload` to `pipeline`."""
    _require_fit(settings.max_rows, pipeline.profile)
    if not settings.needs_keys:
        logger.warning("no API key is set: anyone on this machine may ask, so only %s answers", settings.host)
    keys = KeyRing.of(settings)
    told = receivers(settings, keys)
    jobs = JobStore(settings.database_url, notifies=told.any, max_losses=settings.max_losses, track=settings.track)
    worker = Worker(jobs, pipeline, JobFiles(jobs.database, _videos_store(settings.store_url)), settings)
    webhooks = WebhookSender(jobs, told.find) if told.any else None
    limits = limits or ServingLimits.of(pipeline.recipe, pipeline.profile)
    limits = limits.model_copy(update={"max_engine_rows": 2 * settings.max_rows})
    made: list[ServerProcess] = []
    app = _make_app(worker, webhooks, keys, limits, is_stopping=lambda: bool(made) and made[0].should_exit)
    made.append(ServerProcess(uvicorn_config(app, settings), worker, reload or (lambda: pipeline)))
    return made[0]


def _require_fit(max_rows: int, profile: ShapeProfile | None) -> None:
    if profile is not None and 2 * max_rows > profile.max.batch:
        raise ValueError(
            f"max_rows {max_rows} takes {2 * max_rows} rows a call, two a video; the engine's profile ends at"
            f" {profile.max.batch}: use at most {profile.max.batch // 2}, or export with a wider profile"
        )


def _make_app(
    worker: Worker,
    webhooks: WebhookSender | None,
    keys: KeyRing,
    limits: ServingLimits,
    *,
    is_stopping: Callable[[], bool],
) -> FastAPI:
    settings, pipeline = worker.settings, worker.pipeline

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        worker.start()
        if webhooks:
            webhooks.start()
        try:
            yield
        finally:
            await run_in_threadpool(worker.stop)
            if webhooks:
                await run_in_threadpool(webhooks.stop)
            worker.jobs.close()

    service = Service(
        settings=settings,
        model=ServedModel(
            name=settings.model_name or f"stiv-{pipeline.recipe.name}",
            recipe=pipeline.recipe,
            limits=limits,
            count_tokens=pipeline.text_encoder.count_tokens,
        ),
        jobs=worker.jobs,
        files=worker.files,
        worker_state=lambda: worker.state,
        on_created=worker.wake,
        on_deleted=worker.cancel,
        retry_after_s=lambda: _room_in_s(worker.jobs, settings),
        is_stopping=is_stopping,
        keys=keys,
        makers=CapacityLimiter(MAKERS),
        rate=RateLimit(settings.requests_per_minute),
        moderator=open_moderator(settings),
    )
    return create_app(service, lifespan=lifespan)


def _videos_store(url: str) -> ArtifactStore:
    """Videos come and go by their jobs; a registry counts what none of its manifests names as garbage."""
    store = open_store(url)
    if store.list("refs/"):
        raise ValueError(
            f"{store.url} holds a registry, whose garbage collection would delete videos; name another folder or prefix"
            " for them (STIV_VIDEOS_URL)"
        )
    return store


def _room_in_s(jobs: JobStore, settings: ServerSettings) -> float:
    """When a full queue will have room again, by what its replicas said last."""
    outlook = Outlook.merge([Outlook.from_json(said) for said in jobs.states(settings.lease_s)])
    return outlook.retry_after(jobs.waiting(settings.max_queued))
