"""A cluster made ready for gangs, and asked whether it is."""

from pathlib import Path

import kubernetes_validate
import pytest
from typer.testing import CliRunner

from flows.cli import app
from infra.cluster.client import ClusterClient
from infra.cluster.objects import JOB_SET, POD_MONITOR
from infra.cluster.setup.check import check
from infra.cluster.setup.foundations import RIGHTS, foundations
from tests.api_server import Cluster, kubeconfig
from tests.cluster_recipes import IMAGE
from tests.cluster_recipes import cluster as made
from tests.cluster_world import World

CLAIM = "/api/v1/namespaces/stiv/persistentvolumeclaims/stiv-work"


def test_every_foundation_is_one_that_the_api_takes() -> None:
    for _, thing in foundations(made(), gpus=8):
        kubernetes_validate.validate(dict(thing), "1.36", strict=True)


def test_nothing_is_granted_by_star_and_no_secret_may_be_read() -> None:
    assert not [rule for rule in RIGHTS if "*" in (rule[0], rule[1], *rule[2]) or rule[1] == "secrets"]


def test_a_bare_cluster_is_made_ready_and_says_so(api: tuple[Cluster, str], cluster: Cluster, tmp_path: Path) -> None:
    toml = tmp_path / "cluster.toml"
    gpu = '[gpu]\nproduct = "NVIDIA-H100-80GB-HBM3"\nper_node = 8'
    head = f'namespace = "stiv"\nimage = "{IMAGE}"\nstore = "s3://videos/stiv"'
    toml.write_text(f'{head}\n[storage]\nclaim = "stiv-work"\n{gpu}')
    where = [str(toml), "--kubeconfig", str(kubeconfig(tmp_path, api[1]))]
    before = CliRunner().invoke(app, ["cluster", "check", *where])
    assert before.exit_code == 1 and "stiv cluster bootstrap" in before.stdout

    assert CliRunner().invoke(app, ["cluster", "bootstrap", *where, "--gpus", "16"]).exit_code == 0
    count = len(cluster.objects)
    assert CliRunner().invoke(app, ["cluster", "bootstrap", *where, "--gpus", "16"]).exit_code == 0
    assert len(cluster.objects) == count == 8
    cluster.add(CLAIM, {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}})
    World(cluster, "none").gpu_nodes()
    for node in ("node-0", "node-1"):
        status = {"allocatable": {"nvidia.com/gpu": "8"}, "conditions": [{"type": "Ready", "status": "True"}]}
        cluster.update(f"/api/v1/nodes/{node}", status=status)
    after = CliRunner().invoke(app, ["cluster", "check", *where])
    assert after.exit_code == 0 and "16 on 2 ready nodes of 2" in after.stdout and "missing" not in after.stdout


@pytest.mark.parametrize(
    "told",
    [
        "JobSet is not installed: `kubectl apply --server-side",
        "no permission to create jobsets; have role stiv-controller bound",
        "several nodes need ReadWriteMany",
        "no node has product 'NVIDIA-H100-80GB-HBM3'; they have NVIDIA-L4",
    ],
)
def test_what_is_missing_is_told_with_the_way_out(told: str, client: ClusterClient, cluster: Cluster) -> None:
    cluster.served = {"", "rbac.authorization.k8s.io", "authorization.k8s.io", "networking.k8s.io"}
    cluster.forbidden.add(("create", "jobsets"))
    cluster.add(CLAIM, {"spec": {"accessModes": ["ReadWriteOnce"]}})
    World(cluster, "none").gpu_nodes("NVIDIA-L4")
    answers = list(check(client, made()))
    assert [answer for answer in answers if told in answer.told and not answer.good]
    assert {JOB_SET.name, POD_MONITOR.name} <= {answer.about.partition(" ")[0] for answer in answers}
