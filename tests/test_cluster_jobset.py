"""A stage as a JobSet: what it is called, what stands in it, and that the API's own schemas take it."""

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from infra.cluster.config import GpuConfig, load_cluster
from infra.cluster.jobset import config_map, job_set, pod_monitor
from infra.cluster.request import NodeOrder
from tests.cluster_recipes import IMAGE, cluster, request
from tests.cluster_schemas import JOB_SET, POD_MONITOR
from tests.conftest import Golden

RICH: dict[str, Any] = {
    "queue": "research",
    "node": {
        "selector": {"pool": "a"},
        "tolerations": [{"key": "nvidia.com/gpu"}, {"key": "team", "operator": "Equal", "value": "video"}],
        "priority_class": "research-high",
        "topology": "topology.kubernetes.io/zone",
        "rdma": {"rdma/hca": 8},
    },
    "pull_secrets": ["registry"],
    "environment": {"NCCL_DEBUG": "WARN"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kueue": RICH,
    "scheduler": {**RICH, "queue": None},
    "cpu": {"gpu": None, "cpu_ranks_per_node": 2, "secret": None},
    "s3": {"storage": {"checkpoints": "s3://videos/runs"}, "gpu": {"product": "A100", "per_node": 8}},
}


def pod_of(made: Any) -> Any:
    return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


@pytest.mark.parametrize(("variant", "version"), [*((name, "1.36") for name in VARIANTS), ("kueue", "1.33")])
def test_every_object_is_one_that_the_api_takes(variant: str, version: str) -> None:
    wanted = request(**VARIANTS[variant])
    made: Any = job_set(wanted, 2, 600)
    jsonschema.validate(made, JOB_SET)
    jsonschema.validate(pod_monitor(wanted), POD_MONITOR)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    core = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": job["template"]["spec"]},
        dict(config_map(wanted, 2, 600)),
    ]
    for thing in core:
        kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("variant", ["plain", "kueue"])
def test_the_objects_of_a_stage_are_the_committed_ones(variant: str, golden: Golden) -> None:
    wanted = request(**VARIANTS[variant])
    made = [job_set(wanted, 2, 600), pod_monitor(wanted)]
    golden(f"cluster/{variant}.yaml", yaml.safe_dump_all(made, sort_keys=False, width=120))


def test_a_schema_of_ours_refuses_a_field_that_jobset_does_not_have() -> None:
    made: Any = job_set(request(), 2, 600)
    made["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(made, JOB_SET)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_fits_the_restricted_pod_security_standard(variant: str) -> None:
    pod = pod_of(job_set(request(**VARIANTS[variant]), 2, 600))["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert {kind for volume in pod["volumes"] for kind in volume} <= {
        "name",
        "emptyDir",
        "configMap",
        "persistentVolumeClaim",
    }
    for container in pod["containers"]:
        held = container["securityContext"]
        assert held == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }


def test_the_same_stage_has_the_same_name_and_another_one_another() -> None:
    assert request().name == request().name
    assert request().name.startswith("t2v-") and len(request(name="t2v_256_40_" + "x" * 60).name) <= 41
    others = [
        request(training={"steps": 9}),
        request(image=IMAGE.replace("ab", "cd")),
        request(store="s3://videos/other"),
    ]
    assert len({request().name, *(other.name for other in others)}) == 4


def test_what_a_resumed_run_may_change_does_not_change_the_name() -> None:
    assert request(2).name == request(4).name
    assert request(training={"checkpoint_every": 3}).name == request().name
    assert request(grace_seconds=7, queue="other").name == request().name


def test_a_newer_image_goes_on_in_the_same_run_folder() -> None:
    newer = request(image=IMAGE.replace("ab", "cd"))
    assert (newer.run, newer.name != request().name) == (request().run, True)


def test_the_pods_read_the_recipe_with_the_number_of_ranks_they_are() -> None:
    wanted = request(8, training={"global_batch_size": 8}, elastic={"min_nodes": 1})
    order = NodeOrder.model_validate_json(config_map(wanted, 2, 600)["data"]["order.json"])
    assert (order.nodes, order.recipe.training.world_size) == (2, 4)
    assert wanted.cluster.sizes(wanted.recipe) == (4, 2, 1)


def test_without_elastic_there_is_one_size() -> None:
    assert cluster().sizes(request(8).recipe) == (4,)


WRITTEN = f"""
namespace = "stiv"
image = "{IMAGE}"
store = "s3://videos/stiv"
"""
CLAIM = '\n[storage]\nclaim = "stiv-work"\n'
REFUSED = {
    "image by tag": (WRITTEN.replace(IMAGE, "train:latest") + CLAIM, "image: String should match pattern"),
    "nowhere to save": (WRITTEN + "[storage]", "name a ReadWriteMany claim, or an s3:// place"),
    "a secret": (WRITTEN + CLAIM + '[environment]\nAWS_SECRET_ACCESS_KEY = "x"', "the Secret that `secret` names"),
    "misspelt": (WRITTEN + 'que = "x"' + CLAIM, "que: Extra inputs are not permitted"),
    "pattern": (WRITTEN + CLAIM + '[hang]\nlog_patterns = ["("]', "is no regular expression"),
    "not TOML": (WRITTEN + "=", "is not TOML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_cluster_toml_that_cannot_work_is_refused_with_the_way_out(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as refusal:
        load_cluster(path)
    assert message in str(refusal.value) and str(path) in str(refusal.value)


def test_the_guides_cluster_toml_is_one(tmp_path: Path) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text()
    path = tmp_path / "cluster.toml"
    path.write_text(guide.partition("```toml\n")[2].partition("```")[0].replace("…", "ab" * 32))
    assert load_cluster(path).gpu == GpuConfig(product="NVIDIA-H100-80GB-HBM3", per_node=8)


@pytest.mark.parametrize(
    ("ranks", "fields", "message"),
    [
        (8, {"gpu": {"product": "A100", "per_node": 3}}, "does not fill nodes of 3 ranks; use 6 or 9"),
        (4, {"storage": {"checkpoints": "s3://videos/runs"}}, "2 nodes need storage.claim"),
    ],
)
def test_a_stage_that_does_not_fit_the_nodes_is_refused(ranks: int, fields: dict[str, Any], message: str) -> None:
    wanted = request(ranks, **fields)
    with pytest.raises(ValueError, match=message):
        wanted.cluster.layout(wanted.recipe)
