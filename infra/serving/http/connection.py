"""One HTTP connection: what is not HTTP, or is too slow to say what it wants or to read its answer, is sent away.

It owns these limits, which uvicorn leaves open; it knows nothing of the app behind them.
"""

import asyncio
import logging
import resource
from typing import Any

import h11
from fastapi import FastAPI
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from infra.serving.http.errors import envelope_bytes
from infra.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 1024
SPARE_FILES = 256
"""Beside connections: databases, stores, decoders, what a server opens while it works."""
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 503: b"Service Unavailable"}


class Connection(H11Protocol):
    head_timeout_s = 10.0
    stall_timeout_s = 60.0
    max_connections = 4096

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._turn_away(503, f"{self.max_connections} connections are open already; come again later", "too_many")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._is_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More waits to be read than is kept for a client."""
        super().pause_writing()
        self._is_read()
        self._stall_timer = self.loop.call_later(self.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # a head has begun, or is still missing
            self._await_head()
        else:
            self._head_arrived()

    def send_400_response(self, msg: str) -> None:
        self._turn_away(400, "this is not an HTTP request that can be read", "malformed_request")

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _is_read(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _head_is_late(self) -> None:
        self._turn_away(408, f"no request came in {self.head_timeout_s:g} s", "request_timeout")

    def _turn_away(self, status: int, message: str, code: str) -> None:
        self._head_arrived()
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
            body = envelope_bytes(status, message, code=code)
            head = [
                b"HTTP/1.1 %d %s" % (status, REASONS[status]),
                b"content-type: application/json",
                b"content-length: %d" % len(body),
                b"connection: close",
            ]
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
        self.transport.close()


def open_at_most(connections: int) -> int:
    """So many, or what the limit of open files leaves: past that limit nobody would be answered at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    wanted = connections + SPARE_FILES
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if files > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    left = max(1, max(soft, files) - SPARE_FILES)
    if left < connections:
        logger.warning("%s files may be open, so %s connections are taken, not %s", max(soft, files), left, connections)
    return min(connections, left)


def uvicorn_config(app: FastAPI, settings: ServerSettings) -> Config:
    class Limited(Connection):
        head_timeout_s = settings.head_timeout_s
        stall_timeout_s = settings.stall_timeout_s
        max_connections = open_at_most(settings.max_connections)

    return Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Limited,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=10,
    )
