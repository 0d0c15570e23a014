"""A database or a store that does not answer: the work waits and is tried again, so an outage loses no job.

It owns which errors are an outage's and the pace of trying; it knows nothing of jobs. Whatever else goes wrong is the
job's own, or a bug, and is raised.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import exc

from infra.store.artifacts import StoreRefused

logger = logging.getLogger(__name__)

Done = TypeVar("Done")

OUTAGE = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, OSError, StoreRefused)
"""Lost connections, locks that are not let go, full disks, refused credentials: whoever runs the place can end them."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


class GivenUp(Exception):
    """The work is no longer wanted, or the worker has to stop; the job is handed back."""


def through_outages(work: Callable[[], Done], *, wanted: Callable[[], bool], what: str) -> Done:
    """The result of `work`, tried until it comes or is no longer wanted.

    Raises:
        GivenUp: it is not wanted any more.
    """
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return work()
        except OUTAGE as error:
            logger.warning("%s failed and is tried again in %.1f s: %s", what, wait_s, error)
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            if not wanted():
                raise GivenUp(what)
            time.sleep(0.02)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
