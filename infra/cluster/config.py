"""`cluster.toml`: where gangs run, as a frozen tree of its own beside the recipe.

It owns the fields, their ranges and how they must agree; it does not know what objects they become.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from model.config import Config, Positive
from model.recipe import StageRecipe

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
"""An amount as Kubernetes writes it: 500m, 64Gi."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Seconds = Annotated[int, Field(ge=1)]


class GpuConfig(Config):
    """What a node brings."""

    product: str
    """Of the label `nvidia.com/gpu.product`, which the GPU operator writes."""
    per_node: Positive
    """GPUs and ranks of a pod."""
    resource: str = "nvidia.com/gpu"


class Toleration(Config):
    """A taint that the pods may stand on."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] | None = None


class NodeConfig(Config):
    """A pod's share of its node, and which nodes it may be placed on."""

    cpu: Quantity = "8"
    memory: Quantity = "64Gi"
    shared_memory: Quantity = "16Gi"
    """/dev/shm, for loader workers and NCCL; it counts against `memory`."""
    scratch: Quantity = "100Gi"
    """Local disk for inputs and caches; gone with the pod."""
    selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    priority_class: str | None = None
    topology: str | None = None
    """Label of the nodes, such as topology.kubernetes.io/zone: all pods of a gang are placed on one value of it."""
    rdma: dict[str, Positive] = Field(default_factory=dict)
    """Further resources of a pod by name, such as rdma/hca or vpc.amazonaws.com/efa."""


class StorageConfig(Config):
    """Where checkpoints live while a stage trains."""

    claim: Name | None = None
    """A ReadWriteMany PersistentVolumeClaim for run folders; ranks on several nodes need one."""
    checkpoints: str | None = None
    """s3:// place that keeps checkpoints too, no registry's; the only one where there is no claim."""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if self.claim is None and self.checkpoints is None:
            raise ValueError(
                "neither storage.claim nor storage.checkpoints is set: a lost node would take all checkpoints with it;"
                " name a ReadWriteMany claim, or an s3:// place"
            )
        return self


class RestartConfig(Config):
    """How often ranks start again. Disruptions have no bound."""

    crashes: Annotated[int, Field(ge=0)] = 3
    """Ends in an error of a rank's own that are tried again."""
    without_progress: Positive = 5
    """Restarts in a row without a newer checkpoint that end the run, whatever caused them."""


class ElasticConfig(Config):
    """Fewer nodes where the full number finds no place."""

    min_nodes: Positive
    patience_seconds: Seconds = 900
    """How long pods may wait for a place before the gang is made anew with fewer."""


class HangConfig(Config):
    """When silent ranks are taken to hang, and what in a log means that they will never go on."""

    start_seconds: Seconds = 1200
    step_seconds: Seconds = 120
    """At least; slow steps get several times their own length."""
    checkpoint_seconds: Seconds = 1200
    log_patterns: tuple[str, ...] = (r"NCCL WARN .*(unhandled|timed out)", r"Xid.*: 79,")
    """Regular expressions; a line of a rank's log that one is found in ends the attempt as a hang."""

    @field_validator("log_patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class ClusterConfig(Config):
    """One cluster, as stages are launched on it."""

    namespace: Name
    image: Annotated[str, Field(pattern=r"^\S+@sha256:[0-9a-f]{64}$")]
    """By digest: a tag may name other code at the next restart."""
    store: Annotated[str, Field(pattern=r"^s3://")]
    """The registry that pods read inputs from and publish to."""
    storage: StorageConfig
    gpu: GpuConfig | None = None
    """None trains on CPUs."""
    cpu_ranks_per_node: Positive = 1
    node: NodeConfig = NodeConfig()
    queue: Name | None = None
    """Kueue's LocalQueue; None leaves placing to the scheduler, pod by pod."""
    service_account: Name = "stiv-train"
    secret: Name | None = "stiv-store"
    """Secret with AWS_* variables for the store; None where the service account itself is let in."""
    pull_secrets: tuple[Name, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    """Further variables, such as AWS_ENDPOINT_URL or NCCL_*; a secret has no place here."""
    metrics_port: Annotated[int, Field(ge=1024, le=65535)] = 9400
    pod_monitor: bool = True
    """Make a PodMonitor, for the Prometheus operator."""
    grace_seconds: Seconds = 600
    """From SIGTERM to SIGKILL: a step and a checkpoint must fit. Twice the measured save time where that is longer."""
    keep_finished_seconds: Seconds = 7 * 24 * 3600
    restarts: RestartConfig = RestartConfig()
    elastic: ElasticConfig | None = None
    hang: HangConfig = HangConfig()

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if re.search(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|PRIVATE", name):
                raise ValueError(f"environment.{name} looks like a secret; put it into the Secret that `secret` names")
        return variables

    @property
    def ranks_per_node(self) -> int:
        return self.cpu_ranks_per_node if self.gpu is None else self.gpu.per_node

    def layout(self, recipe: StageRecipe) -> tuple[int, int]:
        """Nodes, and ranks on each, that a stage asks for; ValueError where that cannot be here."""
        ranks = recipe.training.world_size
        if ranks <= self.ranks_per_node:
            return 1, ranks
        nodes, left = divmod(ranks, self.ranks_per_node)
        if left:
            raise ValueError(
                f"training.world_size {ranks} does not fill nodes of {self.ranks_per_node} ranks; use"
                f" {nodes * self.ranks_per_node} or {(nodes + 1) * self.ranks_per_node}"
            )
        if self.storage.claim is None:
            raise ValueError(
                f"{nodes} nodes need storage.claim, a ReadWriteMany volume: ranks make one checkpoint in one folder"
                f" that all see; name one, or train on one node ({self.ranks_per_node} ranks)"
            )
        return nodes, self.ranks_per_node

    def sizes(self, recipe: StageRecipe) -> tuple[int, ...]:
        """Numbers of nodes the stage may run on, the wanted one first: all others divide the global batch as well."""
        nodes, ranks = self.layout(recipe)
        if self.elastic is None:
            return (nodes,)
        fewer = range(nodes - 1, self.elastic.min_nodes - 1, -1)
        return (nodes, *(count for count in fewer if _fits(recipe, count * ranks)))


def with_ranks(recipe: StageRecipe, ranks: int) -> StageRecipe:
    """The recipe on another number of ranks; pydantic's ValidationError where the batch does not divide."""
    tree = recipe.model_dump()
    tree["training"]["world_size"] = ranks
    return StageRecipe.model_validate(tree)


def _fits(recipe: StageRecipe, ranks: int) -> bool:
    try:
        with_ranks(recipe, ranks)
    except ValidationError:
        return False
    return True


def load_cluster(path: Path) -> ClusterConfig:
    """Read `cluster.toml`; ValueError names the key, what is wrong with it and the file."""
    try:
        return ClusterConfig.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; docs/cluster.md shows what a cluster.toml holds") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path}: {problems}") from None
