"""A cluster's controllers and kubelets, played by hand on the small API server: what JobSet, Job and nodes would do.

It owns the fields they write; it does not know what is tested with it.
"""

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from infra.cluster.objects import ATTEMPT_LABEL, INDEX_LABEL, JOB_SET, JOB_SET_LABEL, NODE, POD
from tests.api_server import Cluster

UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available."


@dataclass
class World:
    """One gang's surroundings."""

    cluster: Cluster
    name: str
    namespace: str = "stiv"
    attempt: int = 0
    pods: list[str] = field(default_factory=list[str])

    @property
    def job_set(self) -> str:
        return JOB_SET.path(self.namespace, self.name)

    @property
    def nodes(self) -> int:
        spec = self.cluster.objects[self.job_set]["spec"]["replicatedJobs"][0]["template"]["spec"]
        return spec["parallelism"]

    def gpu_nodes(self, product: str = "NVIDIA-H100-80GB-HBM3", count: int = 2) -> None:
        for number in range(count):
            name = f"node-{number}"
            thing = {"kind": "Node", "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": product}}}
            self.cluster.add(NODE.path(None, name), thing)

    def make_pods(self) -> None:
        """As the Job controller does."""
        uid = self.cluster.objects[self.job_set]["metadata"]["uid"]
        self.pods = []
        for node in range(self.nodes):
            name = f"{self.name}-node-0-{node}-{uuid4().hex[:5]}"
            held = {JOB_SET_LABEL: self.name, ATTEMPT_LABEL: str(self.attempt), INDEX_LABEL: str(node)}
            owner = {"uid": uid}
            thing = {"kind": "Pod", "metadata": {"name": name, "labels": held, "ownerReferences": [owner]}, "spec": {}}
            self.cluster.add(POD.path(self.namespace, name), thing)
            self.pods.append(name)

    def pod(self, node: int, **merged: Any) -> None:
        self.cluster.update(POD.path(self.namespace, self.pods[node]), **merged)

    def place(self) -> None:
        for node in range(self.nodes):
            self.pod(node, spec={"nodeName": f"node-{node}"}, status={"phase": "Pending"})

    def run(self) -> None:
        for node in range(self.nodes):
            self.pod(node, spec={"nodeName": f"node-{node}"}, status={"phase": "Running", "conditions": []})

    def unschedulable(self, message: str = UNSCHEDULABLE) -> None:
        told = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        for node in range(self.nodes):
            self.pod(node, status={"phase": "Pending", "conditions": [told]})

    def waiting(self, reason: str, message: str) -> None:
        state = {"waiting": {"reason": reason, "message": message}}
        self.pod(0, status={"phase": "Pending", "containerStatuses": [{"name": "ranks", "state": state}]})

    def event(self, reason: str, message: str) -> None:
        name = uuid4().hex
        involved = {"kind": "Job", "name": f"{self.name}-node-0"}
        thing = {"kind": "Event", "reason": reason, "message": message, "involvedObject": involved}
        self.cluster.add(f"/api/v1/namespaces/{self.namespace}/events/{name}", thing)

    def restart(self, *, crash: bool = False) -> None:
        """All pods go, all come again."""
        self.clear()
        self.attempt += 1
        told = self.cluster.objects[self.job_set].get("status", {})
        crashes = told.get("restartsCountTowardsMax", 0) + crash
        status = {"restarts": told.get("restarts", 0) + 1, "restartsCountTowardsMax": crashes}
        self.cluster.update(self.job_set, status=status)
        self.make_pods()

    def suspend(self) -> None:
        """As Kueue does for others' sake."""
        self.cluster.update(self.job_set, spec={"suspend": True})
        self.clear()

    def admit(self) -> None:
        self.cluster.update(self.job_set, spec={"suspend": False})
        self.make_pods()

    def complete(self) -> None:
        self.cluster.update(self.job_set, status={"terminalState": "Completed"})

    def fail(self, message: str = "jobset failed due to reaching max number of restarts") -> None:
        told = [{"type": "Failed", "status": "True", "reason": "ReachedMaxRestarts", "message": message}]
        self.cluster.update(self.job_set, status={"terminalState": "Failed", "conditions": told})

    def clear(self) -> None:
        for pod in self.pods:
            self.cluster.drop(POD.path(self.namespace, pod))
        self.pods = []
