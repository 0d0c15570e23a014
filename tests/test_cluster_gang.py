"""A gang on a cluster, followed from its start to its end, through everything that befalls it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.cluster.client import ClusterClient, ClusterError
from infra.cluster.diagnosis import explain
from infra.cluster.follow import Follower, Look
from infra.cluster.gang import ClusterGang
from infra.cluster.informer import Informer
from infra.cluster.journal import GangJournal, Progress
from infra.cluster.objects import CONFIG_MAP, JOB_SET, POD_MONITOR
from infra.cluster.request import GangRequest
from infra.launch.local import GangFailed
from infra.store.folder import FolderStore
from tests.api_server import Cluster
from tests.cluster_recipes import request
from tests.cluster_world import World


class Run:
    """A gang, its world and who follows it."""

    def __init__(self, client: ClusterClient, cluster: Cluster, folder: Path, wanted: GangRequest) -> None:
        self.gang = ClusterGang(client, wanted)
        self.journal = GangJournal(FolderStore(folder / "store"), wanted.name)
        self.follower = Follower(self.gang, self.journal, poll_seconds=0.05, stuck_seconds=0.2)
        self.world = World(cluster, wanted.name)

    def until(self, state: str, *, attempts: int = 100) -> Look:
        for _ in range(attempts):
            look = self.follower.step()
            if look.standing.state == state:
                return look
        raise AssertionError(f"it stays {look.standing}")

    def saved(self, step: int) -> None:
        self.journal.tell(Progress(number=0, step=step, total_steps=10, checkpoint_step=step))


@pytest.fixture
def run(client: ClusterClient, cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    made = Run(client, cluster, tmp_path, request(restarts={"without_progress": 3}))
    with made.gang:
        yield made


@pytest.fixture
def elastic(client: ClusterClient, cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    made = Run(client, cluster, tmp_path, request(elastic={"min_nodes": 1, "patience_seconds": 1}))
    with made.gang:
        yield made


def test_a_gang_lives_through_a_bad_day(run: Run, cluster: Cluster) -> None:
    cluster.fail_next("POST", "jobsets", 500, "InternalError")
    assert run.gang.launch()
    run.world.make_pods()
    run.until("pending")
    run.world.place()
    run.until("starting")
    cluster.drop_watches()
    run.world.run()
    run.until("running")
    cluster.compact()
    cluster.drop_watches()
    run.world.suspend()
    run.until("suspended")
    run.world.admit()
    run.world.run()
    run.until("running")
    run.world.restart()
    run.until("restarting")
    run.world.run()
    look = run.until("running")
    assert (look.restarts, look.standing.crashes) == (1, 0)
    run.world.complete()
    assert run.until("succeeded").standing.restarts == 1


def test_everything_that_a_gang_made_goes_with_its_jobset(run: Run, cluster: Cluster) -> None:
    run.gang.launch()
    name = run.gang.request.name
    assert {kind.path("stiv", name) for kind in (CONFIG_MAP, JOB_SET, POD_MONITOR)} == set(cluster.objects)
    assert run.gang.terminate() == "stopped" == run.gang.status()
    assert not cluster.objects


def test_a_second_controller_attaches_instead_of_starting_twice(
    run: Run, client: ClusterClient, cluster: Cluster
) -> None:
    assert run.gang.launch()
    uid = cluster.objects[run.world.job_set]["metadata"]["uid"]
    with ClusterGang(client, run.gang.request) as second:
        assert not second.launch()
        assert second.look().state == "pending"
    assert cluster.objects[run.world.job_set]["metadata"]["uid"] == uid


def test_a_create_whose_answer_was_lost_starts_one_gang(run: Run, cluster: Cluster) -> None:
    cluster.fail_next("POST", "jobsets", 0, "", after=True)
    run.gang.launch()
    assert run.until("pending").standing.nodes == 2


def test_a_jobset_of_that_name_that_is_anothers_is_left_alone(run: Run, cluster: Cluster) -> None:
    run.gang.launch()
    cluster.update(run.world.job_set, metadata={"annotations": {"stiv.dev/stage-manifest": "another"}})
    with pytest.raises(ValueError, match="was not made from this stage manifest"):
        run.gang.launch()


def test_one_that_failed_says_why_and_is_made_anew_at_the_next_launch(run: Run, cluster: Cluster) -> None:
    run.gang.launch()
    uid = cluster.objects[run.world.job_set]["metadata"]["uid"]
    run.world.fail()
    with pytest.raises(GangFailed, match=r"failed after 0 restarts.*reaching max number of restarts.*stiv logs"):
        run.until("succeeded")
    assert run.gang.launch()
    assert cluster.objects[run.world.job_set]["metadata"]["uid"] != uid


def test_one_that_somebody_deletes_is_lost(run: Run, cluster: Cluster) -> None:
    run.gang.launch()
    run.until("pending")
    cluster.drop(run.world.job_set)
    with pytest.raises(GangFailed, match="somebody deleted JobSet"):
        run.until("succeeded")


def test_disruptions_have_no_bound_while_checkpoints_grow(run: Run, cluster: Cluster) -> None:
    run.gang.launch()
    run.world.make_pods()
    for step in range(1, 8):
        run.saved(step)
        run.world.restart()
        run.world.run()
        assert run.until("running").standing.restarts <= step
        run.until("running")


def test_restarts_without_a_newer_checkpoint_end_it_and_a_second_controller_counts_on(
    run: Run, client: ClusterClient, cluster: Cluster, tmp_path: Path
) -> None:
    run.gang.launch()
    run.world.make_pods()
    run.saved(4)
    run.until("pending")
    for _ in range(2):
        run.world.restart()
        run.until("restarting")
    successor = Run(client, cluster, tmp_path, run.gang.request)
    with successor.gang:
        assert not successor.gang.launch()
        run.world.restart()
        with pytest.raises(GangFailed, match="3 times in a row without getting beyond the checkpoint of step 4"):
            successor.until("succeeded")
    assert run.world.job_set not in cluster.objects


def test_too_few_nodes_shrink_an_elastic_gang_and_a_restart_grows_it_again(elastic: Run, cluster: Cluster) -> None:
    elastic.gang.launch()
    elastic.world.make_pods()
    elastic.world.unschedulable()
    elastic.until("pending")
    while cluster.objects[elastic.world.job_set]["metadata"]["annotations"]["stiv.dev/nodes"] == "2":
        elastic.follower.step()
    elastic.world.make_pods()
    elastic.world.run()
    assert elastic.until("running").standing.nodes == 1
    assert '"world_size": 2' in cluster.objects[CONFIG_MAP.path("stiv", elastic.world.name)]["data"]["order.json"]
    elastic.world.restart()
    while cluster.objects[elastic.world.job_set]["metadata"]["annotations"]["stiv.dev/nodes"] == "1":
        elastic.follower.step()
    assert elastic.until("pending").restarts == 1  # of the JobSet before: they are carried over


def test_the_grace_is_twice_the_measured_save_where_that_is_longer(run: Run, cluster: Cluster) -> None:
    run.gang.launch(save_seconds=400.0)
    job = cluster.objects[run.world.job_set]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 800


STUCK = {
    "image": ("waiting", ("ImagePullBackOff", "not found"), r"image registry.*cannot be pulled.*pull_secrets"),
    "secret": ("waiting", ("CreateContainerConfigError", 'secret "stiv-store" not found'), "make that Secret"),
    "claim": ("unschedulable", ('persistentvolumeclaim "stiv-work" not found',), r"claim 'stiv-work'.*storage\.claim"),
    "quota": (
        "event",
        ("FailedCreate", "exceeded quota: gpus, requested: nvidia.com/gpu=4, used: nvidia.com/gpu=6, limited: 8"),
        r"quota 'gpus' is exceeded: nvidia.com/gpu=4 requested",
    ),
    "queue": ("event", ("Pending", "LocalQueue research doesn't exist"), "Kueue has no LocalQueue"),
    "account": (
        "event",
        ("FailedCreate", "error looking up service account stiv/stiv-train"),
        r"'stiv-train'.*cluster bootstrap",
    ),
}


@pytest.mark.parametrize("case", STUCK)
def test_what_waiting_will_not_mend_ends_it_in_a_sentence_with_the_way_out(case: str, run: Run) -> None:
    what, told, sentence = STUCK[case]
    run.gang.launch()
    run.world.gpu_nodes()
    run.world.make_pods()
    getattr(run.world, what)(*told)
    with pytest.raises(GangFailed, match=sentence):
        run.until("succeeded")


def test_a_gpu_product_that_no_node_has_is_told_with_those_they_have(run: Run) -> None:
    run.gang.launch()
    run.world.gpu_nodes("NVIDIA-A100-SXM4-80GB")
    run.world.make_pods()
    run.world.unschedulable("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.")
    with pytest.raises(GangFailed, match=r"no node has GPU product 'NVIDIA-H100.*the nodes have: NVIDIA-A100"):
        run.until("succeeded")


def test_a_resource_that_is_short_is_named_and_waited_for(run: Run) -> None:
    run.gang.launch()
    run.world.gpu_nodes()
    run.world.make_pods()
    run.world.unschedulable()
    looks = [run.follower.step() for _ in range(10)]
    finding = looks[-1].finding
    assert finding is not None and finding.waits and "short of nvidia.com/gpu on 3 nodes" in finding.what


@pytest.mark.parametrize(
    ("status", "reason", "message", "sentence"),
    [
        (
            403,
            "Forbidden",
            'jobsets is forbidden: User "ana" cannot create',
            "`stiv cluster bootstrap` writes the role",
        ),
        (404, "NotFound", "the server could not find the requested resource", "JobSet is not installed"),
        (404, "NotFound", 'namespaces "stiv" not found', "make namespace 'stiv' with"),
        (401, "Unauthorized", "Unauthorized", "log in anew"),
    ],
)
def test_a_refusal_of_the_server_is_told_with_the_way_out(
    status: int, reason: str, message: str, sentence: str, run: Run, cluster: Cluster
) -> None:
    cluster.fail_next("POST", "jobsets", status, reason, message=message)
    with pytest.raises(ClusterError) as refusal:
        run.gang.launch()
    assert sentence in explain(refusal.value, run.gang.request.cluster)


def test_an_informer_without_permission_says_so(run: Run, cluster: Cluster) -> None:
    run.gang.launch()
    cluster.forbidden.add(("watch", "pods"))
    cluster.compact()
    cluster.drop_watches()
    with pytest.raises(ClusterError, match=r"cannot watch pods: pods is forbidden"):
        run.until("running")


def test_informers_end_with_their_gang(client: ClusterClient, cluster: Cluster) -> None:
    with ClusterGang(client, request()) as gang:
        watching: list[Informer] = gang._informers
        gang.look(0.2)
    cluster.drop_watches()
    for informer in watching:
        informer._thread.join(5)
    assert not any(informer._thread.is_alive() for informer in watching)
