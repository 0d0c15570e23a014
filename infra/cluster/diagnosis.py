"""Why a gang does not start, in one sentence with the way out.

It reads what scheduler, kubelet, quota and Kueue have written down; it knows nothing of gangs' states, and asks nobody.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from infra.cluster.client import ClusterError, Conflict, NotFound
from infra.cluster.config import ClusterConfig
from infra.cluster.objects import Object, meta, several, status

PRODUCT_LABEL = "nvidia.com/gpu.product"
JOB_SET_MANIFEST = "https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml"
_SHORT = re.compile(r"(\d+) Insufficient ([\w./-]*\w)")
_QUOTA = re.compile(r"exceeded quota: ([\w.-]+), requested: (\S+), used: (\S+), limited: (\S+)")
_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclass(slots=True, frozen=True)
class Finding:
    """What stands in a gang's way."""

    what: str
    """A sentence, with the way out."""
    waits: bool
    """Whether time alone may end it: others finish, nodes come."""


def diagnose(
    cluster: ClusterConfig, pods: Iterable[Object], events: Sequence[Object], nodes: Sequence[Object] | None
) -> Finding | None:
    """The most telling of what there is; `nodes` is None where the caller may not list them.

    `events` are of the gang's JobSet, Jobs, pods and Workload.
    """
    for pod in pods:
        found = _container(pod, cluster) or _placing(pod, cluster, nodes)
        if found is not None:
            return found
    for event in events:
        found = _event(str(event.get("reason", "")), str(event.get("message", "")), cluster)
        if found is not None:
            return found
    return None


def explain(error: ClusterError, cluster: ClusterConfig) -> str:
    """An API server's refusal as a sentence with the way out."""
    text = str(error)
    if error.status == 0:
        return f"{text}; check the server's address in the kubeconfig, and whether it is reachable from here"
    if error.status == 401:
        return f"{text}; the kubeconfig's credentials are not accepted: log in anew"
    if error.status == 403 and "exceeded quota" in text:
        quota = _quota(text)
        return text if quota is None else quota.what
    if error.status == 403:
        return f"{text}; `stiv cluster bootstrap` writes the role that is needed, for who may grant it"
    if isinstance(error, NotFound) and "namespaces" in text:
        return f"{text}; make namespace '{cluster.namespace}' with `stiv cluster bootstrap`"
    if isinstance(error, NotFound) and "jobsets" in text and "requested resource" in text:
        command = f"kubectl apply --server-side -f {JOB_SET_MANIFEST}"
        return f"{text}: JobSet is not installed; an administrator runs `{command}`"
    if isinstance(error, Conflict):
        return f"{text}; somebody else changes it too: look with `stiv status`, then try again"
    return text


def _container(pod: Object, cluster: ClusterConfig) -> Finding | None:
    for container in several(status(pod), "containerStatuses"):
        state: Object = container.get("state") or {}
        waiting: Object = state.get("waiting") or {}
        reason, message = waiting.get("reason"), waiting.get("message", "")
        if reason in _PULL:
            return Finding(
                f"the image {cluster.image} cannot be pulled ({reason}: {message}); check its name and digest, and"
                " pull_secrets for a private registry",
                waits=False,
            )
        if reason == "CreateContainerConfigError":
            return Finding(
                f"the container cannot be made ({message}); make that Secret in namespace '{cluster.namespace}', or"
                " change `secret` in the cluster.toml",
                waits=False,
            )
    return None


def _placing(pod: Object, cluster: ClusterConfig, nodes: Sequence[Object] | None) -> Finding | None:
    for found in several(status(pod), "conditions"):
        if (found.get("type"), found.get("status")) == ("PodScheduled", "False"):
            return _unschedulable(str(found.get("message", "")), cluster, nodes)
    return None


def _unschedulable(message: str, cluster: ClusterConfig, nodes: Sequence[Object] | None) -> Finding:
    if claim := _CLAIM.search(message):
        return Finding(
            f"unschedulable: the claim '{claim[1]}' is not in namespace '{cluster.namespace}'; make it, or change"
            " storage.claim",
            waits=False,
        )
    wrong = _wrong_product(cluster, nodes)
    if wrong is not None:
        return wrong
    if short := _SHORT.findall(message):
        what = " and ".join(f"{resource} on {count} nodes" for count, resource in short)
        return Finding(
            f"unschedulable: short of {what} ({message}); wait, add nodes, or ask for fewer ranks", waits=True
        )
    if "node affinity/selector" in message or "untolerated taint" in message:
        return Finding(
            f"unschedulable: {message}; check node.selector, node.tolerations and gpu.product against"
            " `kubectl get nodes --show-labels`",
            waits=True,
        )
    return Finding(f"unschedulable: {message or 'the scheduler gives no reason'}", waits=True)


def _wrong_product(cluster: ClusterConfig, nodes: Sequence[Object] | None) -> Finding | None:
    if cluster.gpu is None or not nodes:
        return None
    products = sorted({meta(node, "labels").get(PRODUCT_LABEL, "") for node in nodes} - {""})
    if cluster.gpu.product in products:
        return None
    have = ", ".join(products) or f"none; is the GPU operator installed? It writes the label {PRODUCT_LABEL}"
    return Finding(
        f"no node has GPU product '{cluster.gpu.product}'; the nodes have: {have}. Change gpu.product in the"
        " cluster.toml, or add such nodes",
        waits=False,
    )


def _event(reason: str, message: str, cluster: ClusterConfig) -> Finding | None:
    if quota := _quota(message):
        return quota
    if "violates PodSecurity" in message:
        return Finding(
            f"the namespace refuses the pods ({message}); they fit 'restricted', so look at what changes them on"
            " their way: an admission webhook or policy",
            waits=False,
        )
    if "error looking up service account" in message:
        return Finding(
            f"service account '{cluster.service_account}' is not in namespace '{cluster.namespace}';"
            " `stiv cluster bootstrap` makes it",
            waits=False,
        )
    if "no PriorityClass" in message:
        name = cluster.node.priority_class
        return Finding(f"there is no PriorityClass '{name}'; make it, or change node.priority_class", waits=False)
    if "LocalQueue" in message and ("doesn't exist" in message or "not found" in message):
        return Finding(
            f"Kueue has no LocalQueue '{cluster.queue}' in namespace '{cluster.namespace}'; make it, or change `queue`",
            waits=False,
        )
    if reason == "Pending" and "couldn't assign flavors" in message:
        return Finding(f"Kueue waits for quota: {message}; see `kubectl describe workload`", waits=True)
    return None


def _quota(message: str) -> Finding | None:
    found = _QUOTA.search(message)
    if found is None:
        return None
    name, requested, used, limited = found.groups()
    return Finding(
        f"quota '{name}' is exceeded: {requested} requested, {used} used of {limited}; ask for fewer ranks, wait for"
        " other gangs, or have the quota raised",
        waits=False,
    )
