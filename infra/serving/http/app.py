"""The HTTP app: routes, errors and middleware of one service put together, and its OpenAPI document.

It owns their order; it knows nothing of what they do.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from infra.serving.http import operations, page, videos
from infra.serving.http.errors import answer_in_envelopes
from infra.serving.http.middleware import NameAndCount, OwnPagesOnly
from infra.serving.http.schema import ImageReference, VideoReference
from infra.serving.http.service import Service

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

ROUTERS = (videos.router, operations.router, page.router)
DESCRIPTION = (
    "Videos from text and images, as OpenAI's videos API makes them. Every error is OpenAI's envelope. A video is"
    " created, polled or followed by events, and downloaded; one that failed is an answer with status `failed`, not an"
    " HTTP error."
)


def create_app(service: Service, *, lifespan: Lifespan | None = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    answer_in_envelopes(app)
    if not service.settings.needs_keys:
        app.add_middleware(OwnPagesOnly, hosts=service.settings.allowed_hosts)
    app.add_middleware(NameAndCount)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    document = openapi_document()
    app.openapi = lambda: document
    return app


def openapi_document() -> dict[str, Any]:
    """Of every server, whatever it serves."""
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    document = get_openapi(title="STIV videos", version="1", description=DESCRIPTION, routes=app.routes)
    schemas = document["components"]["schemas"]
    for kind in (ImageReference, VideoReference):  # only bodies that routes read by themselves name them
        schemas[kind.__name__] = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return document
