"""A stage from `stiv launch` to its promoted checkpoint: real commands, a real S3 server, real ranks."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from infra.cluster.client import ClusterClient
from infra.cluster.jobset import job_set
from infra.cluster.node import exit_code, run_node
from infra.cluster.objects import CONFIG_MAP, JOB_SET
from infra.cluster.request import NodeOrder
from infra.ingest import ingest
from infra.launch.host import EXIT_HOPELESS, EXIT_LOST
from infra.launch.local import Failure, GangFailed
from infra.registry.opening import open_registry
from model.recipe import load
from tests.api_server import Cluster, kubeconfig
from tests.cluster_recipes import IMAGE
from tests.cluster_world import World
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

CURRICULUM = """
name = "short"
stages = ["t2i"]
[corpus]
shapes = 16
heldout_shapes = 8
num_frames = 4
size = 32
gate = [{ metric = "train_samples", op = ">=", bound = 1 }]
"""
STAGE = """
name = "t2i"
task = "t2i"
network = { hidden_size = 32, depth = 3, num_heads = 2, temporal_patch_size = 1, temporal_attention = false }
video = { num_frames = 1, height = 32, width = 32 }
vae = { latent_channels = 4, spatial_factor = 8 }
optimizer = { lr = 1e-3, warmup_steps = 0 }
training = { steps = 2, global_batch_size = 4, micro_batch_size = 4, log_every = 1 }
data = { weights = { moving_shapes = 1.0 } }
sampling = { num_steps = 1 }
evaluation = { heldout_clips = 4, sample_prompts = 2 }
gate = [{ metric = "heldout_loss", op = "<", bound = 100.0 }]
"""


class Site:
    """A recipe, a cluster.toml and a kubeconfig, and `stiv` on them."""

    def __init__(self, folder: Path, address: str, store: str) -> None:
        self.recipe, self.store = folder / "curriculum.toml", store
        self.recipe.write_text(CURRICULUM)
        (folder / "t2i.toml").write_text(STAGE)
        lines = [f'namespace = "stiv"\nimage = "{IMAGE}"\nstore = "{store}"', '[storage]\nclaim = "stiv-work"']
        self.cluster = folder / "cluster.toml"
        self.cluster.write_text("\n".join(lines))
        self.kubeconfig = kubeconfig(folder, address)

    def stiv(self, command: str, *more: str) -> Result:
        where = ["--recipe", str(self.recipe), "--cluster", str(self.cluster), "--kubeconfig", str(self.kubeconfig)]
        return CliRunner().invoke(app, [command, "t2i", *where, *more])


@pytest.fixture
def site(api: tuple[Cluster, str], s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    own = {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    for name, value in {**own, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    made = Site(tmp_path, api[1], s3_server.url())
    ingest(open_registry(made.store, {}), load(made.recipe), tmp_path / "ingest", videos=None, who="tests")
    return made


def wait_for(cluster: Cluster, what: str) -> str:
    """The name of the gang's object of that kind, once it is there."""
    for _ in range(300):
        for path in list(cluster.objects):
            if f"/{what}/" in path:
                return path.rpartition("/")[2]
        time.sleep(0.1)
    raise AssertionError(f"no {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow  # starts real ranks
def test_a_stage_is_launched_runs_on_a_node_and_is_promoted(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    results: list[Result] = []
    controller = threading.Thread(target=lambda: results.append(site.stiv("launch")))
    controller.start()
    world = World(cluster, wait_for(cluster, "jobsets"))
    wait_for(cluster, "podmonitors")
    world.make_pods()
    world.run()
    order = NodeOrder.model_validate_json(cluster.objects[CONFIG_MAP.path("stiv", world.name)]["data"]["order.json"])
    environment = {**os.environ, "JOB_COMPLETION_INDEX": "0"}
    order = order.model_copy(update={"metrics_port": 0})
    meet_at = f"127.0.0.1:{free_port()}"
    assert run_node(order, environment, tmp_path / "work", meet_at=meet_at) == 0

    told = json.loads(site.stiv("status", "--json").stdout)
    assert (told["state"], told["running"], told["progress"]["checkpoint_step"]) == ("running", 1, 2)
    world.complete()
    controller.join(60)
    assert results[0].exit_code == 0, results[0]
    assert "t2i/promoted ->" in results[0].stdout and "1 of 1 nodes run" in results[0].stdout
    promoted = open_registry(site.store, {}).resolve("t2i/promoted")
    assert promoted.parents == order.inputs and "heldout_loss" in promoted.metrics

    assert run_node(order, environment, tmp_path / "elsewhere", meet_at=meet_at) == 0  # it is done: nothing runs again
    again = site.stiv("launch")
    assert again.exit_code == 0 and promoted.digest in again.stdout


def test_a_gang_is_looked_at_and_cancelled(site: Site, cluster: Cluster, client: ClusterClient) -> None:
    nothing = site.stiv("status")
    assert nothing.exit_code == 1 and "jobsets" in str(nothing.exception) and "not found" in str(nothing.exception)
    assert "not found" in str(site.stiv("attach").exception)
    from infra.cluster.config import load_cluster
    from infra.cluster.stage import request_for

    recipe = load(site.recipe).stage("t2i")
    request = request_for(recipe, open_registry(site.store, {}), load_cluster(site.cluster))
    client.create(JOB_SET, job_set(request, 1, 1))
    world = World(cluster, request.name)
    world.make_pods()
    world.unschedulable()
    shown = site.stiv("status").stdout
    assert "pending; 0 of 1 nodes run" in shown and "short of nvidia.com/gpu on 3 nodes" in shown
    assert site.stiv("logs").exit_code == 0
    assert site.stiv("cancel").exit_code == 0 and not cluster.objects


def test_what_a_node_cannot_do_is_hopeless_and_lost_peers_are_not_a_crash(site: Site, tmp_path: Path) -> None:
    recipe = load(site.recipe).stage("t2i")
    order = NodeOrder(
        name="t2i-0123456789",
        run="t2i-0",
        recipe=recipe,
        inputs={"dataset": "0" * 64, "codec": "1" * 64},
        store=site.store,
        checkpoints=None,
        nodes=1,
        ranks_per_node=1,
        metrics_port=0,
        grace_seconds=5,
    )
    assert run_node(order, {}, tmp_path / "work") == EXIT_HOPELESS
    assert exit_code(GangFailed("rank 1 ended with exit code 1: ValueError: a bug", Failure(1, 1))) == 1
    assert exit_code(GangFailed("RuntimeError: Connection closed by peer [10.0.0.2]", Failure(1, 1))) == EXIT_LOST
    assert exit_code(GangFailed("rank 0 ended with exit code -9 (SIGKILL)", Failure(0, -9))) == EXIT_LOST
