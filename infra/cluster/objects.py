"""The Kubernetes objects this project makes and reads, as types: the fields that are used, and no more.

They are plain JSON; tests hold them to the API's own schemas. It does not know who makes them or where they go.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Required, TypedDict

Object = Mapping[str, Any]
"""An object as the API server gives it."""
Labels = dict[str, str]


@dataclass(slots=True, frozen=True)
class Kind:
    """A kind of object, and where the API serves it."""

    group: str
    """Empty is the core API."""
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str | None = None) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(["namespaces", namespace] if namespace and self.namespaced else []), self.plural]
        return "/".join([*parts, name] if name else parts)


JOB_SET = Kind("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet")
CONFIG_MAP = Kind("", "v1", "configmaps", "ConfigMap")
POD = Kind("", "v1", "pods", "Pod")
EVENT = Kind("", "v1", "events", "Event")
NODE = Kind("", "v1", "nodes", "Node", namespaced=False)
POD_MONITOR = Kind("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor")
LOCAL_QUEUE = Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "LocalQueue")

JOB_SET_LABEL = "jobset.sigs.k8s.io/jobset-name"
ATTEMPT_LABEL = "jobset.sigs.k8s.io/restart-attempt"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
RUN_LABEL = "stiv.dev/run"
STAGE_LABEL = "stiv.dev/stage"
CARRIED_ANNOTATION = "stiv.dev/carried"
MANIFEST_ANNOTATION = "stiv.dev/stage-manifest"
NODES_ANNOTATION = "stiv.dev/nodes"


class Metadata(TypedDict, total=False):
    name: Required[str]
    namespace: str
    labels: Labels
    annotations: Labels
    ownerReferences: list["OwnerReference"]


class OwnerReference(TypedDict):
    apiVersion: str
    kind: str
    name: str
    uid: str


class EnvVar(TypedDict, total=False):
    name: Required[str]
    value: str
    valueFrom: dict[str, dict[str, str]]


class Mount(TypedDict, total=False):
    name: Required[str]
    mountPath: Required[str]
    readOnly: bool


class Volume(TypedDict, total=False):
    name: Required[str]
    emptyDir: dict[str, str]
    configMap: dict[str, str]
    persistentVolumeClaim: dict[str, str]


class Port(TypedDict):
    name: str
    containerPort: int


class ContainerSecurity(TypedDict):
    allowPrivilegeEscalation: bool
    capabilities: dict[str, list[str]]
    readOnlyRootFilesystem: bool


class Resources(TypedDict):
    requests: dict[str, str]
    limits: dict[str, str]


class Container(TypedDict):
    name: str
    image: str
    command: list[str]
    env: list[EnvVar]
    envFrom: list[dict[str, dict[str, str]]]
    ports: list[Port]
    resources: Resources
    securityContext: ContainerSecurity
    terminationMessagePolicy: Literal["FallbackToLogsOnError"]
    volumeMounts: list[Mount]


class TolerationSpec(TypedDict, total=False):
    key: Required[str]
    operator: Required[str]
    value: str
    effect: str


class PodSecurity(TypedDict):
    runAsNonRoot: bool
    runAsUser: int
    runAsGroup: int
    fsGroup: int
    fsGroupChangePolicy: Literal["OnRootMismatch"]
    seccompProfile: dict[str, str]


class PodSpec(TypedDict, total=False):
    restartPolicy: Required[Literal["Never"]]
    serviceAccountName: Required[str]
    automountServiceAccountToken: Required[bool]
    terminationGracePeriodSeconds: Required[int]
    securityContext: Required[PodSecurity]
    containers: Required[list[Container]]
    volumes: Required[list[Volume]]
    nodeSelector: Labels
    tolerations: list[TolerationSpec]
    priorityClassName: str
    affinity: dict[str, Any]
    imagePullSecrets: list[dict[str, str]]


class PodTemplate(TypedDict):
    metadata: dict[str, Labels]
    spec: PodSpec


class PodFailureRule(TypedDict, total=False):
    action: Required[Literal["FailJob", "Ignore", "Count"]]
    onPodConditions: list[dict[str, str]]
    onExitCodes: dict[str, Any]


class JobSpec(TypedDict):
    completionMode: Literal["Indexed"]
    completions: int
    parallelism: int
    backoffLimit: int
    podFailurePolicy: dict[str, list[PodFailureRule]]
    template: PodTemplate


class JobTemplate(TypedDict):
    spec: JobSpec


class ReplicatedJob(TypedDict):
    name: str
    replicas: int
    template: JobTemplate


class FailureRule(TypedDict, total=False):
    name: Required[str]
    action: Required[Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]]
    onJobFailureReasons: list[str]
    onJobFailureMessagePatterns: list[str]


class FailurePolicy(TypedDict):
    maxRestarts: int
    restartStrategy: Literal["Recreate", "BlockingRecreate"]
    rules: list[FailureRule]


class JobSetSpec(TypedDict):
    replicatedJobs: list[ReplicatedJob]
    network: dict[str, bool]
    successPolicy: dict[str, str]
    failurePolicy: FailurePolicy
    ttlSecondsAfterFinished: int


class JobSet(TypedDict):
    apiVersion: str
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


class ConfigMap(TypedDict):
    apiVersion: str
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]
    immutable: NotRequired[bool]


class PodMonitor(TypedDict):
    apiVersion: str
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: dict[str, Any]


def meta(thing: Object, kind: Literal["labels", "annotations"]) -> Mapping[str, str]:
    """An object's labels or annotations; empty where it has none."""
    return thing["metadata"].get(kind) or {}


def status(thing: Object) -> Object:
    """What its controller says of it; empty before it has said anything."""
    return thing.get("status") or {}


def several(thing: Object, key: str) -> list[Object]:
    """A list of objects within one; empty where it has none."""
    return thing.get(key) or []


def condition(thing: Object, name: str) -> Object | None:
    """A status condition that holds now."""
    for found in several(status(thing), "conditions"):
        if found.get("type") == name and found.get("status") == "True":
            return found
    return None
