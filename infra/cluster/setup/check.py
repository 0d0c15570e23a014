"""Whether a cluster has what a gang needs, thing by thing, each with the way out.

It owns the questions; it changes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from infra.cluster.client import ClusterClient, ClusterError, NotFound
from infra.cluster.config import ClusterConfig
from infra.cluster.diagnosis import JOB_SET_MANIFEST, PRODUCT_LABEL, explain
from infra.cluster.objects import JOB_SET, LOCAL_QUEUE, NODE, POD_MONITOR, Kind, Object, condition, meta, status
from infra.cluster.setup.foundations import NAMESPACE, RIGHTS, SERVICE_ACCOUNT

CLAIM = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
REVIEW = Kind("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", namespaced=False)


@dataclass(slots=True, frozen=True)
class Answer:
    """One question's."""

    about: str
    good: bool
    needed: bool
    """Without it no gang starts; otherwise something is missed."""
    told: str


def check(client: ClusterClient, cluster: ClusterConfig) -> Iterator[Answer]:
    """In an order in which the first bad answer is the one to mend first."""
    namespace = cluster.namespace
    yield _there(client, cluster, NAMESPACE, None, namespace, "`stiv cluster bootstrap` makes it")
    yield _kind(client, cluster, JOB_SET, f"`kubectl apply --server-side -f {JOB_SET_MANIFEST}`")
    yield from _rights(client, cluster)
    account = cluster.service_account
    yield _there(client, cluster, SERVICE_ACCOUNT, namespace, account, "`stiv cluster bootstrap` makes it")
    if cluster.storage.claim is not None:
        yield _asked("claim", cluster, lambda: _claim(client, cluster))
    if cluster.queue is not None:
        out = "make it, or change `queue`"
        yield _there(client, cluster, LOCAL_QUEUE, namespace, cluster.queue, out)
    if cluster.gpu is not None:
        yield _asked("GPUs", cluster, lambda: _gpus(client, cluster), needed=False)
    if cluster.pod_monitor:
        yield _kind(client, cluster, POD_MONITOR, "nobody scrapes gangs; install the Prometheus operator", needed=False)


def _asked(about: str, cluster: ClusterConfig, ask: Callable[[], tuple[bool, str]], *, needed: bool = True) -> Answer:
    try:
        good, told = ask()
    except ClusterError as error:
        good, told = False, explain(error, cluster)
    return Answer(about, good, needed, told)


def _there(
    client: ClusterClient, cluster: ClusterConfig, kind: Kind, namespace: str | None, name: str, out: str
) -> Answer:
    def ask() -> tuple[bool, str]:
        try:
            client.get(kind, namespace, name)
        except NotFound as error:
            return False, f"{error}; {out}"
        return True, name

    return _asked(kind.name, cluster, ask)


def _kind(client: ClusterClient, cluster: ClusterConfig, kind: Kind, out: str, *, needed: bool = True) -> Answer:
    def ask() -> tuple[bool, str]:
        try:
            client.list(kind, cluster.namespace)
        except NotFound:
            return False, f"{kind.name} is not installed: {out}"
        return True, kind.api_version

    return _asked(f"{kind.name} kind", cluster, ask, needed=needed)


def _rights(client: ClusterClient, cluster: ClusterConfig) -> Iterator[Answer]:
    """As `kubectl auth can-i` asks, of whoever asks here."""

    def ask() -> tuple[bool, str]:
        lacking = [
            f"{verb} {resource}"
            for group, resource, verbs in RIGHTS
            for verb in verbs
            if not _may(client, cluster.namespace, group, resource, verb)
        ]
        if lacking:
            return False, f"no permission to {', '.join(lacking)}; have role stiv-controller bound to you"
        return True, "all that `stiv launch` needs"

    yield _asked("permissions", cluster, ask)


def _may(client: ClusterClient, namespace: str, group: str, resource: str, verb: str) -> bool:
    plural, _, part = resource.partition("/")
    wanted = {"namespace": namespace, "verb": verb, "group": group, "resource": plural, "subresource": part}
    review = {
        "apiVersion": REVIEW.api_version,
        "kind": REVIEW.name,
        "metadata": {},
        "spec": {"resourceAttributes": wanted},
    }
    return bool(status(client.create(REVIEW, review)).get("allowed"))


def _claim(client: ClusterClient, cluster: ClusterConfig) -> tuple[bool, str]:
    name = cluster.storage.claim or ""
    try:
        found = client.get(CLAIM, cluster.namespace, name)
    except NotFound as error:
        return False, f"{error}; make it, ReadWriteMany, or change storage.claim"
    modes: list[str] = found["spec"].get("accessModes") or []
    if "ReadWriteMany" not in modes:
        return False, f"'{name}' is {', '.join(modes) or 'without access mode'}; several nodes need ReadWriteMany"
    return True, f"{name}, {status(found).get('phase', 'of unknown phase')}"


def _gpus(client: ClusterClient, cluster: ClusterConfig) -> tuple[bool, str]:
    assert cluster.gpu is not None, "asked only of clusters with GPUs"
    nodes = client.list(NODE, None).items
    fitting = [node for node in nodes if meta(node, "labels").get(PRODUCT_LABEL) == cluster.gpu.product]
    if not fitting:
        products = sorted({meta(node, "labels").get(PRODUCT_LABEL, "") for node in nodes} - {""})
        have = ", ".join(products) or f"none: the GPU operator writes the label {PRODUCT_LABEL}"
        return False, f"no node has product '{cluster.gpu.product}'; they have {have}"
    ready = [node for node in fitting if condition(node, "Ready")]
    count = sum(_count(node, cluster.gpu.resource) for node in ready)
    return count >= cluster.gpu.per_node, f"{count} on {len(ready)} ready nodes of {len(fitting)}"


def _count(node: Object, resource: str) -> int:
    allocatable: Object = status(node).get("allocatable") or {}
    return int(allocatable.get(resource, 0))
