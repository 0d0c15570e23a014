"""A gang as Kubernetes objects: the ConfigMap its pods read, the JobSet, the PodMonitor.

It owns what stands in them and why; it sends nothing anywhere.
"""

from typing import Any

from infra.cluster.config import ClusterConfig, Toleration
from infra.cluster.objects import (
    ATTEMPT_LABEL,
    CARRIED_ANNOTATION,
    CONFIG_MAP,
    JOB_SET,
    JOB_SET_LABEL,
    MANIFEST_ANNOTATION,
    NODES_ANNOTATION,
    POD_MONITOR,
    QUEUE_LABEL,
    RUN_LABEL,
    STAGE_LABEL,
    ConfigMap,
    Container,
    EnvVar,
    JobSet,
    Labels,
    Mount,
    PodFailureRule,
    PodMonitor,
    PodSpec,
    TolerationSpec,
    Volume,
)
from infra.cluster.request import Carried, GangRequest
from infra.launch.host import EXIT_HOPELESS, EXIT_LOST
from infra.launch.rank import EXIT_STOPPED

ORDER_FILE = "order.json"
ORDER_FOLDER = "/etc/stiv"
WORK_FOLDER = "/work"
SCRATCH_FOLDER = "/scratch"
CONTAINER = "ranks"
JOB = "node"
MEETING_PORT = 29400
_USER = 1000


def config_map(request: GangRequest, nodes: int, grace_seconds: int) -> ConfigMap:
    """The order that the pods read, for a gang of so many nodes."""
    return {
        "apiVersion": CONFIG_MAP.api_version,
        "kind": "ConfigMap",
        "metadata": {
            "name": request.name,
            "namespace": request.cluster.namespace,
            "labels": labels(request),
            "annotations": {MANIFEST_ANNOTATION: request.digest},
        },
        "data": {ORDER_FILE: request.order(nodes, grace_seconds).model_dump_json(indent=1)},
    }


def job_set(request: GangRequest, nodes: int, grace_seconds: int, carried: Carried | None = None) -> JobSet:
    """One pod a node, all or none: whatever befalls one of them, all are made anew.

    A pod that is drained, preempted or evicted carries the condition DisruptionTarget, and ranks that were stopped,
    killed or hung end in a code of their own: the Job then fails for the reason PodFailurePolicy, and such restarts
    count against nothing. What is left is a crash.
    """
    cluster = request.cluster
    carried = carried or Carried()
    queue: Labels = {} if cluster.queue is None else {QUEUE_LABEL: cluster.queue}
    return {
        "apiVersion": JOB_SET.api_version,
        "kind": "JobSet",
        "metadata": {
            "name": request.name,
            "namespace": cluster.namespace,
            "labels": labels(request) | queue,
            "annotations": {
                MANIFEST_ANNOTATION: request.digest,
                NODES_ANNOTATION: str(nodes),
                CARRIED_ANNOTATION: carried.model_dump_json(),
            },
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": max(0, cluster.restarts.crashes - carried.crashes),
                # All old pods are gone before a new one starts: two attempts never write to one folder.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "hopeless",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f".*exit code {EXIT_HOPELESS} .*"],
                    },
                    {
                        "name": "disruption",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "ttlSecondsAfterFinished": cluster.keep_finished_seconds,
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": nodes,
                            "parallelism": nodes,
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": _pod_failure_rules()},
                            "template": {
                                "metadata": {"labels": labels(request), "annotations": _placing(cluster)},
                                "spec": _pod(request, grace_seconds),
                            },
                        }
                    },
                }
            ],
        },
    }


def pod_monitor(request: GangRequest) -> PodMonitor:
    """Has the Prometheus operator scrape the gang; rank 0 alone serves metrics."""
    return {
        "apiVersion": POD_MONITOR.api_version,
        "kind": "PodMonitor",
        "metadata": {"name": request.name, "namespace": request.cluster.namespace, "labels": labels(request)},
        "spec": {
            "selector": {"matchLabels": {JOB_SET_LABEL: request.name}},
            "podTargetLabels": [STAGE_LABEL],
            "podMetricsEndpoints": [{"port": "metrics", "interval": "15s"}],
        },
    }


def labels(request: GangRequest) -> Labels:
    return {"app.kubernetes.io/part-of": "stiv", STAGE_LABEL: request.recipe.name, RUN_LABEL: request.run}


def meeting_point(name: str) -> str:
    """Of all ranks: the first pod, by the name that JobSet gives it within its namespace."""
    return f"{name}-{JOB}-0-0.{name}:{MEETING_PORT}"


def _pod_failure_rules() -> list[PodFailureRule]:
    codes = [EXIT_STOPPED, EXIT_LOST]
    return [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes}},
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_HOPELESS]}},
    ]


def _placing(cluster: ClusterConfig) -> Labels:
    """Kueue places by topology itself; the scheduler is asked by `_affinity`."""
    if cluster.queue is None or cluster.node.topology is None:
        return {}
    return {"kueue.x-k8s.io/podset-required-topology": cluster.node.topology}


def _affinity(request: GangRequest) -> dict[str, Any]:
    term = {
        "labelSelector": {"matchLabels": {RUN_LABEL: request.run}},
        "topologyKey": request.cluster.node.topology,
    }
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _pod(request: GangRequest, grace_seconds: int) -> PodSpec:
    """Fits the "restricted" Pod Security Standard."""
    cluster = request.cluster
    node = cluster.node
    spec: PodSpec = {
        "restartPolicy": "Never",
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(request)],
        "volumes": _volumes(request),
    }
    product: Labels = {} if cluster.gpu is None else {"nvidia.com/gpu.product": cluster.gpu.product}
    if selector := product | node.selector:
        spec["nodeSelector"] = selector
    if node.tolerations:
        spec["tolerations"] = [_toleration(taint) for taint in node.tolerations]
    if node.priority_class is not None:
        spec["priorityClassName"] = node.priority_class
    if node.topology is not None and cluster.queue is None:
        spec["affinity"] = _affinity(request)
    if cluster.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.pull_secrets]
    return spec


def _toleration(taint: Toleration) -> TolerationSpec:
    spec: TolerationSpec = {"key": taint.key, "operator": taint.operator}
    if taint.value is not None:
        spec["value"] = taint.value
    if taint.effect is not None:
        spec["effect"] = taint.effect
    return spec


def _container(request: GangRequest) -> Container:
    cluster = request.cluster
    amounts = {"cpu": cluster.node.cpu, "memory": cluster.node.memory, "ephemeral-storage": cluster.node.scratch}
    amounts |= {name: str(count) for name, count in cluster.node.rdma.items()}
    if cluster.gpu is not None:
        amounts[cluster.gpu.resource] = str(cluster.layout(request.recipe)[1])
    secret = [] if cluster.secret is None else [{"secretRef": {"name": cluster.secret}}]
    return {
        "name": CONTAINER,
        "image": cluster.image,
        "command": ["python", "-m", "infra.cluster.node", f"{ORDER_FOLDER}/{ORDER_FILE}"],
        "env": _environment(cluster),
        "envFrom": secret,
        "ports": [{"name": "metrics", "containerPort": cluster.metrics_port}],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(),
    }


def _environment(cluster: ClusterConfig) -> list[EnvVar]:
    """JOB_COMPLETION_INDEX comes from the Job controller."""
    attempt: EnvVar = {
        "name": "STIV_ATTEMPT",
        "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{ATTEMPT_LABEL}']"}},
    }
    # What libraries write beside the run: the root of the file system is read-only.
    own = {"HOME": SCRATCH_FOLDER, "TMPDIR": SCRATCH_FOLDER, "XDG_CACHE_HOME": f"{SCRATCH_FOLDER}/cache"}
    given: list[EnvVar] = [{"name": name, "value": value} for name, value in (own | cluster.environment).items()]
    return [*given, attempt]


def _mounts() -> list[Mount]:
    return [
        {"name": "order", "mountPath": ORDER_FOLDER, "readOnly": True},
        {"name": "work", "mountPath": WORK_FOLDER},
        {"name": "scratch", "mountPath": SCRATCH_FOLDER},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def _volumes(request: GangRequest) -> list[Volume]:
    cluster = request.cluster
    work: Volume = {"name": "work", "emptyDir": {"sizeLimit": cluster.node.scratch}}
    if cluster.storage.claim is not None:
        work = {"name": "work", "persistentVolumeClaim": {"claimName": cluster.storage.claim}}
    return [
        {"name": "order", "configMap": {"name": request.name}},
        work,
        {"name": "scratch", "emptyDir": {"sizeLimit": cluster.node.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.node.shared_memory}},
    ]
