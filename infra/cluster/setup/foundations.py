"""What a namespace needs before gangs run in it, as objects: accounts, least rights, limits, closed networks.

It owns what stands in them; it sends nothing anywhere.
"""

from collections.abc import Mapping
from typing import Any

from infra.cluster.config import ClusterConfig
from infra.cluster.objects import Kind, Labels

NAMESPACE = Kind("", "v1", "namespaces", "Namespace", namespaced=False)
SERVICE_ACCOUNT = Kind("", "v1", "serviceaccounts", "ServiceAccount")
ROLE = Kind("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDING = Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
NETWORK_POLICY = Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
QUOTA = Kind("", "v1", "resourcequotas", "ResourceQuota")

CONTROLLER = "stiv-controller"
"""Account of what runs `stiv launch` inside the cluster."""
_LABELS: Labels = {"app.kubernetes.io/part-of": "stiv"}
_GANG = {"matchLabels": _LABELS}

RIGHTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("jobset.x-k8s.io", "jobsets", ("create", "delete", "get", "list", "patch", "watch")),
    ("", "configmaps", ("create", "get", "patch")),
    ("monitoring.coreos.com", "podmonitors", ("create", "get", "patch")),
    ("", "pods", ("get", "list", "watch")),
    ("", "pods/log", ("get",)),
    ("", "events", ("list",)),
    ("kueue.x-k8s.io", "localqueues", ("get",)),
    ("", "persistentvolumeclaims", ("get",)),
)
"""Of a controller: group, resource and verbs. Pods themselves have none: they talk to no API server."""


def foundations(cluster: ClusterConfig, *, gpus: int | None = None) -> list[tuple[Kind, Mapping[str, Any]]]:
    """In the order in which they are made; with `gpus`, a quota of so many."""
    policies = [_deny_all(cluster), _gang_network(cluster)]
    quota = [] if gpus is None or cluster.gpu is None else [(QUOTA, _quota(cluster, gpus))]
    return [
        (NAMESPACE, _namespace(cluster)),
        (SERVICE_ACCOUNT, _account(cluster, cluster.service_account)),
        (SERVICE_ACCOUNT, _account(cluster, CONTROLLER)),
        (ROLE, _role(cluster)),
        (ROLE_BINDING, _binding(cluster)),
        *((NETWORK_POLICY, policy) for policy in policies),
        *quota,
    ]


def _named(kind: Kind, cluster: ClusterConfig, name: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": cluster.namespace, "labels": _LABELS}
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata}


def _namespace(cluster: ClusterConfig) -> Mapping[str, Any]:
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    metadata = {"name": cluster.namespace, "labels": _LABELS | levels}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def _account(cluster: ClusterConfig, name: str) -> Mapping[str, Any]:
    return {**_named(SERVICE_ACCOUNT, cluster, name), "automountServiceAccountToken": name == CONTROLLER}


def _role(cluster: ClusterConfig) -> Mapping[str, Any]:
    rules = [{"apiGroups": [group], "resources": [resource], "verbs": list(verbs)} for group, resource, verbs in RIGHTS]
    return {**_named(ROLE, cluster, CONTROLLER), "rules": rules}


def _binding(cluster: ClusterConfig) -> Mapping[str, Any]:
    who = {"kind": "ServiceAccount", "name": CONTROLLER, "namespace": cluster.namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": CONTROLLER}
    return {**_named(ROLE_BINDING, cluster, CONTROLLER), "subjects": [who], "roleRef": role}


def _deny_all(cluster: ClusterConfig) -> Mapping[str, Any]:
    spec: dict[str, Any] = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    return {**_named(NETWORK_POLICY, cluster, "deny-all"), "spec": spec}


def _gang_network(cluster: ClusterConfig) -> Mapping[str, Any]:
    """Ranks meet each other on any port, as NCCL does; besides, names, the store over HTTPS, and who scrapes."""
    dns = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    scraped = {"port": cluster.metrics_port, "protocol": "TCP"}
    spec: dict[str, Any] = {
        "podSelector": _GANG,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": _GANG}]},
            {"from": [{"namespaceSelector": {}}], "ports": [scraped]},
        ],
        "egress": [
            {"to": [{"podSelector": _GANG}]},
            {"ports": dns},
            {"ports": [{"port": 443, "protocol": "TCP"}]},
        ],
    }
    return {**_named(NETWORK_POLICY, cluster, "gangs"), "spec": spec}


def _quota(cluster: ClusterConfig, gpus: int) -> Mapping[str, Any]:
    assert cluster.gpu is not None, "asked only of clusters with GPUs"
    hard = {f"requests.{cluster.gpu.resource}": str(gpus)}
    return {**_named(QUOTA, cluster, "gpus"), "spec": {"hard": hard}}
