"""The server process: one worker thread behind one HTTP app, started and stopped in good order.

It owns how the parts are put together; it knows nothing of what they do.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import uvicorn
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
from infra.serving.safety.moderation import open_moderator
from infra.serving.settings import ServerSettings
from infra.serving.worker import Worker
from infra.store.location import open_store
from monitoring import logs, metrics

logger = logging.getLogger(__name__)

MAKERS = 8
"""Threads that read uploads and make jobs."""


def serve(settings: ServerSettings) -> None:
    """Serve an engine folder until SIGTERM or SIGINT; running videos may finish for `drain_s`."""
    logs.configure()
    pipeline = VideoPipeline.load(settings.engine)
    server = make_server(settings, pipeline)
    logger.info("serving %s on http://%s:%s", settings.engine, settings.host, settings.port)
    server.run()


def make_server(
    settings: ServerSettings, pipeline: VideoPipeline, *, limits: ServingLimits | None = None
) -> uvicorn.Server:
    """A server of `pipeline`, ready to run; `limits` default to what its engine allows."""
    _require_fit(settings.max_rows, pipeline.profile)
    if not settings.needs_keys:
        logger.warning("no API key is set: anyone on this machine may ask, so only %s answers", settings.host)
    limits = limits or ServingLimits.of(pipeline.recipe, pipeline.profile)
    made: list[uvicorn.Server] = []
    app = _make_app(settings, pipeline, limits, is_stopping=lambda: bool(made) and made[0].should_exit)
    made.append(uvicorn.Server(uvicorn_config(app, settings)))
    return made[0]


def _require_fit(max_rows: int, profile: ShapeProfile | None) -> None:
    if profile is not None and 2 * max_rows > profile.max.batch:
        raise ValueError(
            f"max_rows {max_rows} takes {2 * max_rows} rows a call, two a video; the engine's profile ends at"
            f" {profile.max.batch}: use at most {profile.max.batch // 2}, or export with a wider profile"
        )


def _make_app(
    settings: ServerSettings, pipeline: VideoPipeline, limits: ServingLimits, *, is_stopping: Callable[[], bool]
) -> FastAPI:
    keys = KeyRing.of(settings)
    told = receivers(settings, keys)
    jobs = JobStore(settings.database_url, notifies=told.any, max_losses=settings.max_losses)
    files = JobFiles(jobs.database, open_store(settings.store_url))
    worker = Worker(jobs, pipeline, files, settings)
    webhooks = WebhookSender(jobs, told.find)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        metrics.set_info(
            metrics.ENGINE_INFO,
            engine=type(pipeline.engine).__name__,
            stage=pipeline.recipe.name,
            digest=pipeline.digest[:12],
        )
        worker.start()
        if told.any:
            webhooks.start()
        try:
            yield
        finally:
            await run_in_threadpool(worker.stop)
            await run_in_threadpool(webhooks.stop)
            jobs.close()

    service = Service(
        settings=settings,
        model=ServedModel(
            name=settings.model_name or f"stiv-{pipeline.recipe.name}",
            recipe=pipeline.recipe,
            limits=limits,
            count_tokens=pipeline.text_encoder.count_tokens,
        ),
        jobs=jobs,
        files=files,
        worker_state=lambda: "ready" if worker.is_alive else "stopped",
        on_created=worker.wake,
        on_deleted=lambda _job_id: None,
        retry_after_s=lambda: settings.retry_after_s,
        is_stopping=is_stopping,
        keys=keys,
        makers=CapacityLimiter(MAKERS),
        rate=RateLimit(settings.requests_per_minute),
        moderator=open_moderator(settings),
    )
    return create_app(service, lifespan=lifespan)
