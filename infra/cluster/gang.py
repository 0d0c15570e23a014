"""A stage's gang on Kubernetes: made or attached to, looked at, made anew with another number of nodes, deleted.

It owns the objects' life; when one is made anew or given up is `follow`'s, what stands in them `jobset`'s.
"""

import logging
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from infra.cluster.client import ClusterClient, ClusterError, Conflict, NotFound
from infra.cluster.informer import Informer, News, Relist
from infra.cluster.jobset import config_map, job_set, pod_monitor
from infra.cluster.objects import (
    CARRIED_ANNOTATION,
    CONFIG_MAP,
    EVENT,
    INDEX_LABEL,
    JOB_SET,
    JOB_SET_LABEL,
    MANIFEST_ANNOTATION,
    NODE,
    POD,
    POD_MONITOR,
    RUN_LABEL,
    Object,
    meta,
)
from infra.cluster.request import Carried, GangRequest
from infra.cluster.state import FINAL, GangView, Standing, uid_of
from infra.launch.local import GRACE_SECONDS, Failure, GangFailed, GangStatus

logger = logging.getLogger(__name__)

_GONE_SECONDS = 60.0
"""Beyond the pods' own grace, for the kubelet and the garbage collector."""
_POLL_SECONDS = 1.0


class ClusterGang:
    """The JobSet of one request. Use it as a context: it follows the API server while it is open."""

    def __init__(self, client: ClusterClient, request: GangRequest) -> None:
        self.client, self.request = client, request
        self.view = GangView(request.name)
        self._news: SimpleQueue[News] = SimpleQueue()
        self._informers: list[Informer] = []
        self._told: ClusterError | None = None
        self._terminated = False

    def __enter__(self) -> Self:
        namespace = self.request.cluster.namespace
        for kind, labels in ((JOB_SET, {RUN_LABEL: self.request.run}), (POD, {JOB_SET_LABEL: self.request.name})):
            self._informers.append(Informer(self.client, kind, namespace, labels, self._news))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for informer in self._informers:
            informer.close()

    def launch(self, *, save_seconds: float | None = None) -> bool:
        """Make the gang, or attach to the one that is there; whether it was made.

        One that failed is cleared away and made anew: it goes on from its checkpoint. One that succeeded is attached
        to, and has nothing left to do.
        """
        found = self._found()
        if found is not None and not found["metadata"].get("deletionTimestamp"):
            self._know(found)
            if self.view.standing().state != "failed":
                self._check_same(found)
                return False
        if found is not None:
            self._delete(found)
        nodes = self.request.cluster.sizes(self.request.recipe)[0]
        return self._make(nodes, Carried(), save_seconds)

    def resize(self, nodes: int, carried: Carried, *, save_seconds: float | None = None) -> None:
        """Make the gang anew on so many nodes; it goes on from its checkpoint."""
        found = self._found()
        if found is not None:
            self._delete(found)
        self._make(nodes, carried, save_seconds)

    def look(self, timeout: float = 0.0) -> Standing:
        """Where the gang stands, once there is news or `timeout` seconds have passed.

        Raises ClusterError where the API server refuses to tell, rather than being away.
        """
        deadline = time.monotonic() + timeout
        try:
            self._take(self._news.get(timeout=timeout) if timeout else self._news.get_nowait())
            while time.monotonic() < deadline or not timeout:
                self._take(self._news.get_nowait())
        except Empty:
            pass
        if self._told is not None:
            error, self._told = self._told, None
            raise error
        return self.view.standing()

    def refresh(self) -> Standing:
        """Where the gang stands by a list made now; NotFound where there is none of that name."""
        self._know(self.client.get(JOB_SET, self.request.cluster.namespace, self.request.name))
        pods = self.client.list(POD, self.request.cluster.namespace, labels={JOB_SET_LABEL: self.request.name})
        self.view.relist(POD, pods.items, pods.version)
        return self.view.standing()

    def carried(self) -> Carried:
        """As the JobSet has it written down."""
        made = self.view.job_set
        try:
            return Carried.model_validate_json(meta(made, "annotations")[CARRIED_ANNOTATION]) if made else Carried()
        except (KeyError, ValidationError):  # somebody has edited it: then counting begins anew
            return Carried()

    def note(self, carried: Carried) -> None:
        """Write down how far the run is, for whoever follows it after this process."""
        change = {"metadata": {"annotations": {CARRIED_ANNOTATION: carried.model_dump_json()}}}
        try:
            self.client.patch(JOB_SET, self.request.cluster.namespace, self.request.name, change)
        except ClusterError as error:
            logger.warning("cannot note the run's progress: %s", error)

    def events(self) -> tuple[Object, ...]:
        """Of the gang's objects, newest last; none where the caller may not read them."""
        name = self.request.name
        try:
            found = self.client.list(EVENT, self.request.cluster.namespace).items
        except ClusterError:
            return ()
        ours = [event for event in found if name in str(_involved(event).get("name", ""))]
        return tuple(sorted(ours, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or "")))

    def cluster_nodes(self) -> Sequence[Object] | None:
        """None where the caller may not list nodes."""
        try:
            return self.client.list(NODE, None).items
        except ClusterError:
            return None

    def pod(self, node: int) -> str:
        """The newest pod of a node, by its index."""
        mine = [pod for pod in self.view.pods.values() if meta(pod, "labels").get(INDEX_LABEL, "0") == str(node)]
        if not mine:
            raise ValueError(f"gang '{self.request.name}' has no pod of node {node} now; `stiv status` says why")
        newest = max(mine, key=lambda pod: int(pod["metadata"]["resourceVersion"]))
        return str(newest["metadata"]["name"])

    # `infra.launch.local.Gang`

    def status(self) -> GangStatus:
        state = self.look().state
        if state == "succeeded":
            return "succeeded"
        if self._terminated:
            return "stopped"
        return "failed" if state in FINAL else "running"

    def wait(self, timeout: float | None = None) -> GangStatus:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (standing := self.look(_POLL_SECONDS)).state not in FINAL:
            if deadline is not None and time.monotonic() > deadline:
                return "running"
        status = self.status()
        if status == "failed":
            why = standing.why or "its JobSet was deleted"
            raise GangFailed(f"gang '{self.request.name}' {standing.state}: {why}", Failure(None, 1))
        return status

    def terminate(self, grace: float = GRACE_SECONDS) -> GangStatus:
        """Delete the JobSet: its pods get SIGTERM and their own grace to save; here it is waited `grace` longer."""
        found = self._found()
        if found is not None:
            self._delete(found, grace)
        self._terminated = True
        return "stopped"

    def tail(self, rank: int = 0, lines: int = 20) -> str:
        node = rank // self.request.cluster.layout(self.request.recipe)[1]
        return self.client.log(self.request.cluster.namespace, self.pod(node), lines=lines)

    def _know(self, made: Object) -> None:
        self.view.relist(JOB_SET, [made], made["metadata"]["resourceVersion"])

    def _take(self, news: News) -> None:
        if isinstance(news, Relist):
            self.view.relist(news.kind, news.things, news.version)
        elif isinstance(news, ClusterError):
            self._told = news if news.status in (401, 403, 404) else self._told
        else:
            self.view.apply(news)

    def _found(self) -> Object | None:
        try:
            return self.client.get(JOB_SET, self.request.cluster.namespace, self.request.name)
        except NotFound as error:
            if error.reason and "could not find the requested resource" in str(error):
                raise
            return None

    def _check_same(self, found: Object) -> None:
        theirs = meta(found, "annotations").get(MANIFEST_ANNOTATION)
        if theirs != self.request.digest:
            raise ValueError(
                f"JobSet '{self.request.name}' is there and was not made from this stage manifest"
                f" ({self.request.digest[:16]}, it says {str(theirs)[:16]}); delete it, or use another namespace"
            )

    def _make(self, nodes: int, carried: Carried, save_seconds: float | None) -> bool:
        cluster = self.request.cluster
        grace = max(cluster.grace_seconds, round(2 * (save_seconds or 0.0)))
        # First what the pods read; a change of it by a controller that came to nothing is harmless.
        self.client.apply(CONFIG_MAP, config_map(self.request, nodes, grace), force=True)
        try:
            made = self.client.create(JOB_SET, job_set(self.request, nodes, grace, carried))
        except Conflict:
            made = self._found()
            if made is None:
                raise
            self._check_same(made)
            self._know(made)
            return False
        self._know(made)
        owner = {"apiVersion": JOB_SET.api_version, "kind": "JobSet", "name": self.request.name, "uid": uid_of(made)}
        owned: dict[str, Any] = {"metadata": {"ownerReferences": [owner]}}
        self.client.patch(CONFIG_MAP, cluster.namespace, self.request.name, owned)
        if cluster.pod_monitor:
            monitor: Any = pod_monitor(self.request)
            monitor["metadata"]["ownerReferences"] = [owner]
            try:
                self.client.apply(POD_MONITOR, monitor, force=True)
            except NotFound:
                logger.warning("the Prometheus operator is not installed: no PodMonitor, and nobody scrapes the gang")
        return True

    def _delete(self, found: Object, grace: float = 0.0) -> None:
        namespace, name = self.request.cluster.namespace, self.request.name
        self.client.delete(JOB_SET, namespace, name, uid=uid_of(found))
        spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        deadline = time.monotonic() + grace + spec["terminationGracePeriodSeconds"] + _GONE_SECONDS
        while (left := self._found()) is not None and uid_of(left) == uid_of(found):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"JobSet '{name}' is still being deleted; a node that does not answer may hold its pods:"
                    f" `kubectl get pods -n {namespace} -l {JOB_SET_LABEL}={name} -o wide`",
                    0,
                )
            time.sleep(_POLL_SECONDS)


def _involved(event: Object) -> Object:
    return event.get("involvedObject") or {}
