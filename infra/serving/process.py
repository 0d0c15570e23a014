"""The server process and its signals: SIGTERM drains it in good order, SIGHUP swaps its engine.

It owns what happens on which signal; it knows nothing of how a worker drains or what an engine is.
"""

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable

import uvicorn

from infra.serving.pipeline import VideoPipeline
from infra.serving.worker.worker import Worker

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""Python's own, ten times as long, is what the engine's thread may wait after each of a call's hundreds of operations
while another thread computes."""


class ServerProcess(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, worker: Worker, reload: Callable[[], VideoPipeline]) -> None:
        """`reload` loads what the server should serve now."""
        super().__init__(config)
        self.worker = worker
        self.reload = reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        await super().startup(sockets=sockets)
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.swap)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.drain()  # at once: requests that are still answered must not use up its time
        await super().shutdown(sockets=sockets)

    def swap(self) -> None:
        """Serve what `reload` gives from the next job on; what cannot serve changes nothing, and the log says why."""

        def work() -> None:
            try:
                self.worker.swap(self.reload)
            except Exception:
                logger.exception("the engine was not swapped, the old one goes on")

        threading.Thread(target=work, name="stiv-swap", daemon=True).start()
