"""What state a gang is in, from what the API server says of its JobSet and pods.

It owns the states and the view that changes, in whatever order they come, are put into. It asks nobody for anything,
and decides nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from infra.cluster.client import Change
from infra.cluster.objects import (
    ATTEMPT_LABEL,
    JOB_SET_LABEL,
    NODES_ANNOTATION,
    POD,
    Kind,
    Object,
    condition,
    meta,
    status,
)

GangState = Literal["pending", "suspended", "starting", "running", "restarting", "succeeded", "failed", "lost"]
FINAL: tuple[GangState, ...] = ("succeeded", "failed", "lost")


@dataclass(slots=True, frozen=True)
class Standing:
    """A gang at one moment."""

    state: GangState
    restarts: int
    """Of this JobSet, whatever caused them."""
    crashes: int
    """Those of them that count against the bound."""
    nodes: int
    """Pods the gang consists of."""
    running: int
    why: str = ""
    """Of a gang that failed, as JobSet says it."""


@dataclass(slots=True)
class GangView:
    """The JobSet and the pods of one name, as far as is known.

    A change older than what is known is left out, and so is a pod of a JobSet that bears the name no more: a list and
    a watch, or two watches, may overtake each other.
    """

    name: str
    job_set: Object | None = None
    pods: dict[str, Object] = field(default_factory=dict[str, Object])
    """By uid."""
    _seen: bool = False
    _gone: set[str] = field(default_factory=set[str])
    """Uids that were deleted: no older change brings them back."""

    def relist(self, kind: Kind, things: Iterable[Object], version: str) -> None:
        """What a list of that version says stands above what was known of that kind before; what it leaves out is
        gone, but for what is newer than the list."""
        found = {uid_of(thing): thing for thing in things}
        known = [*self.pods.values()] if kind == POD else [] if self.job_set is None else [self.job_set]
        for thing in known:
            if uid_of(thing) not in found and int(thing["metadata"]["resourceVersion"]) <= int(version):
                self._take(thing)
        for thing in found.values():
            self._put(thing)

    def apply(self, change: Change) -> None:
        if change.kind == "DELETED":
            self._take(change.thing)
        elif change.kind != "BOOKMARK":
            self._put(change.thing)

    def standing(self) -> Standing:
        """Derived from what is there now alone, so that it does not matter how it came about."""
        made = self.job_set
        if made is None:
            return Standing("lost" if self._seen else "pending", 0, 0, 0, 0)
        told = status(made)
        restarts, crashes = int(told.get("restarts") or 0), int(told.get("restartsCountTowardsMax") or 0)
        nodes = int(meta(made, "annotations").get(NODES_ANNOTATION, "1"))
        pods = [pod for pod in self.pods.values() if meta(pod, "labels").get(ATTEMPT_LABEL, "0") == str(restarts)]
        running = sum(_runs(pod) for pod in pods)
        state = _state(made, pods, restarts, nodes, running)
        return Standing(state, restarts, crashes, nodes, running, _why(made) if state == "failed" else "")

    def _put(self, thing: Object) -> None:
        uid = uid_of(thing)
        if uid in self._gone:
            return
        if _is_pod(thing):
            if meta(thing, "labels").get(JOB_SET_LABEL) == self.name and _newer(thing, self.pods.get(uid)):
                self.pods[uid] = thing
        elif thing["metadata"]["name"] == self.name and _newer(thing, self.job_set):
            if self.job_set is not None and uid != uid_of(self.job_set):
                self._gone.add(uid_of(self.job_set))
            self.job_set, self._seen = thing, True

    def _take(self, thing: Object) -> None:
        uid = uid_of(thing)
        self._gone.add(uid)
        self.pods.pop(uid, None)
        self._seen = self._seen or (not _is_pod(thing) and thing["metadata"]["name"] == self.name)
        if self.job_set is not None and uid_of(self.job_set) == uid:
            self.job_set = None


def uid_of(thing: Object) -> str:
    return thing["metadata"]["uid"]


def _state(made: Object, pods: list[Object], restarts: int, nodes: int, running: int) -> GangState:
    terminal = status(made).get("terminalState")
    if terminal == "Completed" or condition(made, "Completed"):
        return "succeeded"
    if terminal == "Failed" or condition(made, "Failed"):
        return "failed"
    if made["spec"].get("suspend"):
        return "suspended"
    # A node that is done waits for the others; it is not missing.
    done = sum(_phase(pod) == "Succeeded" for pod in pods)
    if running + done >= nodes:
        return "running"
    if restarts or any(_phase(pod) == "Failed" or pod["metadata"].get("deletionTimestamp") for pod in pods):
        return "restarting"
    placed = sum(bool(pod.get("spec", {}).get("nodeName")) for pod in pods)
    return "starting" if placed >= nodes else "pending"


def _is_pod(thing: Object) -> bool:
    """Items of a list bear no kind."""
    return JOB_SET_LABEL in meta(thing, "labels")


def _newer(thing: Object, known: Object | None) -> bool:
    if known is None:
        return True
    return int(thing["metadata"]["resourceVersion"]) >= int(known["metadata"]["resourceVersion"])


def _phase(pod: Object) -> str:
    return str(status(pod).get("phase") or "Pending")


def _runs(pod: Object) -> bool:
    return _phase(pod) == "Running" and not pod["metadata"].get("deletionTimestamp")


def _why(made: Object) -> str:
    failed = condition(made, "Failed")
    return "" if failed is None else str(failed.get("message") or failed.get("reason") or "")
