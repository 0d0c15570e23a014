"""A small weighted router: new videos by weight to stable or canary, everything else to whoever answers.

It owns the choice, the second try and the streaming of answers; it knows nothing of videos. Both tracks share one job
database, so any answers for any video, and a request with an idempotency key may be sent twice: one that bears none
gets one here. So a track that dies, drains or answers 502, 503 or 504 costs no client a request.

    python -m infra.rollout.router HOME PORT
"""

import asyncio
import logging
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from infra.rollout.routes import ROUTES, Routes, read_routes
from infra.serving.jobs.table import Track
from monitoring import logs, metrics

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 2**20
"""Of a request that is kept to be sent again; servers have a tighter limit of their own."""
AWAY_S = 2.0
"""A track that did not answer is asked last for so long."""
PATIENCE_S = 20.0
"""How long a request is tried while no track answers."""
PAUSE_S = 0.1
ELSEWHERE = frozenset({502, 503, 504})
"""Statuses that say: not here, or not now."""
_HOPS = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "host", "content-length"}
)


class Router:
    def __init__(self, routes: Path, *, patience_s: float = PATIENCE_S) -> None:
        self.path = routes
        self.patience_s = patience_s
        self._read_at = -1
        self._routes = read_routes(routes)
        self._owed = 0
        """Percent of a video that the canary is behind its share: its turn comes at 100."""
        self._away: dict[str, float] = {}
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=2.0), limits=httpx.Limits(max_keepalive_connections=100)
        )

    @property
    def routes(self) -> Routes:
        """As the file says now; while it is no file of routes, as it said before."""
        try:
            changed = self.path.stat().st_mtime_ns
            if changed != self._read_at:
                self._routes, self._read_at = read_routes(self.path), changed
        except (OSError, ValueError) as error:
            logger.error("the routes stay as they were: %s", error)
        return self._routes

    async def forward(self, request: Request) -> Response:
        body = await _read(request)
        if body is None:
            return _error(413, f"the request is larger than {MAX_BODY_BYTES} bytes", "body_too_large")
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOPS]
        if request.method == "POST" and "idempotency-key" not in request.headers:
            headers.append(("idempotency-key", f"router-{uuid.uuid4().hex}"))
        first = self._turn(new_video=request.method == "POST")
        deadline = time.monotonic() + self.patience_s
        while True:
            for track, url in self._order(first):
                answer = await self._ask(request, track, url, body, headers)
                if answer is not None and answer.status_code not in ELSEWHERE:
                    return _passed_on(answer)
                metrics.ROUTER_RETRIES_TOTAL.inc()
                if answer is not None:
                    await answer.aclose()
            if time.monotonic() >= deadline:
                return _error(503, "no server takes this request now; try again", "no_server")
            await asyncio.sleep(PAUSE_S)

    def _turn(self, *, new_video: bool) -> Track:
        """Whose turn it is: of a hundred new videos the canary gets its weight, evenly spread."""
        if not new_video or self.routes.canary is None:
            return "stable"
        self._owed += self.routes.canary_weight
        if self._owed < 100:
            return "stable"
        self._owed -= 100
        return "canary"

    def _order(self, first: Track) -> list[tuple[Track, str]]:
        """Both tracks, the chosen one first, those that did not answer just now last."""
        routes = self.routes
        known: dict[Track, str] = {"stable": routes.stable}
        if routes.canary is not None and routes.canary_weight:
            known["canary"] = routes.canary
        now = time.monotonic()
        return sorted(known.items(), key=lambda one: (self._away.get(one[1], 0.0) > now, one[0] != first))

    async def _ask(
        self, request: Request, track: Track, url: str, body: bytes, headers: list[tuple[str, str]]
    ) -> httpx.Response | None:
        """An answer whose body is still to come; None if there was none."""
        target = url + request.url.path + (f"?{request.url.query}" if request.url.query else "")
        outgoing = self._client.build_request(request.method, target, content=body, headers=headers)
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.TransportError as error:
            logger.warning("%s at %s does not answer: %r", track, url, error)
            self._away[url] = time.monotonic() + AWAY_S
            metrics.ROUTER_REQUESTS_TOTAL.labels(track, "none").inc()
            return None
        if answer.status_code in ELSEWHERE:
            self._away[url] = time.monotonic() + AWAY_S
        metrics.ROUTER_REQUESTS_TOTAL.labels(track, str(answer.status_code)).inc()
        return answer

    async def close(self) -> None:
        await self._client.aclose()


def _passed_on(answer: httpx.Response) -> Response:
    """Passed on as it comes, compressed or not."""
    headers = {name: value for name, value in answer.headers.items() if name not in _HOPS - {"content-length"}}
    return StreamingResponse(
        answer.aiter_raw(), status_code=answer.status_code, headers=headers, background=BackgroundTask(answer.aclose)
    )


def create_app(router: Router) -> Starlette:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        yield
        await router.close()

    async def forward(request: Request) -> Response:
        try:
            return await router.forward(request)
        except ClientDisconnect:
            return Response(status_code=499)

    async def scrape(_request: Request) -> Response:
        metrics.ROUTER_CANARY_WEIGHT_RATIO.set(router.routes.canary_weight / 100)
        page, content_type = metrics.render(metrics.ROUTING)
        return Response(page, headers={"content-type": content_type})

    methods = ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"]
    routes = [Route("/router/metrics", scrape), Route("/{path:path}", forward, methods=methods)]
    return Starlette(routes=routes, lifespan=lifespan)


async def _read(request: Request) -> bytes | None:
    """The whole body, or None of one that is too large."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _error(status: int, message: str, code: str) -> JSONResponse:
    """OpenAI's envelope, as the servers answer."""
    body: Mapping[str, object] = {"message": message, "type": "server_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status_code=status, headers={"retry-after": "1"})


def main(home: Path, port: int) -> None:
    logs.configure()
    app = create_app(Router(home / ROUTES))
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
