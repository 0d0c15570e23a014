"""What happens to objects of one kind, as it happens: a list, then a watch, and a list again whenever that is lost.

It owns the thread that does so; what the changes mean is not known here.
"""

import logging
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue

from infra.cluster.client import Change, ClusterClient, ClusterError, WatchExpired
from infra.cluster.objects import Kind, Labels, Object

logger = logging.getLogger(__name__)

RESYNC_SECONDS = 300.0
"""After which all is listed again, whatever the watch has told: no lost change is lost for longer."""
_WATCH_SECONDS = 60.0
_REST = 0.5


@dataclass(slots=True, frozen=True)
class Relist:
    """All there is of a kind."""

    kind: Kind
    things: tuple[Object, ...]
    version: str


News = Relist | Change | ClusterError
"""An error is one that trying again does not mend at once; the informer goes on all the same."""


class Informer:
    """Puts the news of one kind into a queue until it is closed."""

    def __init__(
        self, client: ClusterClient, kind: Kind, namespace: str, labels: Labels, news: SimpleQueue[News]
    ) -> None:
        self._client, self._kind, self._namespace, self._labels = client, kind, namespace, labels
        self._news = news
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {kind.plural}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns at once; the thread ends with its watch."""
        self._closed.set()

    def _run(self) -> None:
        version, listed = "", 0.0
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                if not version or began - listed > RESYNC_SECONDS:
                    listing = self._client.list(self._kind, self._namespace, labels=self._labels)
                    self._news.put(Relist(self._kind, listing.items, listing.version))
                    version, listed = listing.version, began
                version = self._follow(version)
            except WatchExpired:
                version = ""
                continue
            except ClusterError as error:
                self._news.put(error)
                version = ""
            if time.monotonic() - began < _REST:  # a watch that ends at once must not become a storm
                self._closed.wait(_REST)

    def _follow(self, version: str) -> str:
        """The last version that was told."""
        labels, seconds = self._labels, _WATCH_SECONDS
        for change in self._client.watch(self._kind, self._namespace, version, labels=labels, seconds=seconds):
            version = change.version
            self._news.put(change)
            if self._closed.is_set():
                break
        return version
