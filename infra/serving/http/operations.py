"""For probes and scrapes: no key, nothing about any video. It knows nothing of the videos API."""

from typing import Any

import psutil
import torch
from fastapi import APIRouter
from fastapi.responses import Response

from infra.serving.http.errors import ApiError, responses
from infra.serving.http.service import Serving
from monitoring import metrics

_PAGE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
}

router = APIRouter()


@router.get("/health", responses=responses())
def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready", responses=responses(503))
def ready(service: Serving) -> dict[str, str]:
    """Jobs are taken and made."""
    state = service.worker_state()
    if state != "ready":
        raise ApiError(503, f"the worker is {state.replace('_', ' ')}", code=f"worker_{state}")
    if not service.jobs.is_reachable():
        raise ApiError(503, "the job database does not answer", code="database_unreachable")
    return {"status": "ready"}


@router.get("/metrics", response_class=Response, responses=_PAGE | responses())
def scrape(service: Serving) -> Response:
    """Every metric of this process, for Prometheus."""
    metrics.QUEUE_DEPTH.set(service.jobs.count("queued"))
    metrics.MEMORY_BYTES.labels("host").set(psutil.Process().memory_info().rss)
    if torch.cuda.is_initialized():
        metrics.MEMORY_BYTES.labels("gpu").set(torch.cuda.memory_reserved())
    page, content_type = metrics.render()
    return Response(page, headers={"content-type": content_type})
