"""A synthetic user: asks for one small golden video now and then, whatever others ask, and shows how that went.

It owns the interval and the metrics; it knows nothing of rollouts. Where few videos are asked for, only this tells that
a service is down.
"""

import logging
import threading
import time

import httpx

from infra.rollout.probe import ProbeFailed, ProbeSettings, draw
from monitoring import metrics

logger = logging.getLogger(__name__)


def watch(url: str, key: str | None, settings: ProbeSettings, *, every_s: float, stop: threading.Event) -> None:
    """Probe the service at `url` until `stop` is set; a probe that fails is counted, never raised."""
    metrics.PROBE_LAST_SUCCESS_TIMESTAMP_SECONDS.set(time.time())
    while not stop.is_set():
        began = time.monotonic()
        try:
            draw(url, key, settings.prompts[0], settings)
        except (ProbeFailed, httpx.HTTPError) as error:
            logger.warning("no synthetic video: %s", error)
            metrics.PROBES_TOTAL.labels("failed").inc()
        else:
            metrics.PROBES_TOTAL.labels("completed").inc()
            metrics.PROBE_SECONDS.observe(time.monotonic() - began)
            metrics.PROBE_LAST_SUCCESS_TIMESTAMP_SECONDS.set(time.time())
        stop.wait(max(0.0, every_s - (time.monotonic() - began)))
