"""A cluster.toml and a stage for tests of gangs on Kubernetes; it knows nothing of how they are run."""

from typing import Any

from infra.cluster.config import ClusterConfig
from infra.cluster.request import GangRequest
from tests.tiny_stage import stage

IMAGE = "registry.example.com/stiv/train@sha256:" + "ab" * 32
INPUTS = {"dataset": "d" * 64, "codec": "c" * 64, "checkpoint": "e" * 64}


def cluster(**fields: Any) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "namespace": "stiv",
            "image": IMAGE,
            "store": "s3://videos/stiv",
            "storage": {"claim": "stiv-work"},
            "gpu": {"product": "NVIDIA-H100-80GB-HBM3", "per_node": 2},
            **fields,
        }
    )


def request(ranks: int = 4, *, name: str = "t2v", training: dict[str, Any] | None = None, **fields: Any) -> GangRequest:
    """Of `ranks` ranks on nodes of two GPUs."""
    tree = stage("t2v", world_size=ranks, micro_batch_size=1, **(training or {})).model_dump()
    recipe = type(stage()).model_validate({**tree, "name": name})
    return GangRequest(recipe, INPUTS, cluster(**fields))
