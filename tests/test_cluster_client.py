"""The door to the API server: what it says of objects and changes, and that it lives through a bad day."""

import threading
from pathlib import Path

import pytest

from infra.cluster.client import ClusterClient, ClusterError, Conflict, NotFound, WatchExpired
from infra.cluster.objects import CONFIG_MAP, JOB_SET
from tests.api_server import Cluster, kubeconfig

PATH = "/api/v1/namespaces/stiv/configmaps"


def note(name: str, text: str = "", **labels: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "stiv", "labels": labels},
        "data": {"text": text},
    }


def test_objects_are_created_found_by_label_changed_and_deleted(client: ClusterClient) -> None:
    made = client.create(CONFIG_MAP, note("a", stage="t2v"))
    client.create(CONFIG_MAP, note("b", stage="t2i"))
    with pytest.raises(Conflict, match="already exists"):
        client.create(CONFIG_MAP, note("a"))
    assert [thing["metadata"]["name"] for thing in client.list(CONFIG_MAP, "stiv", labels={"stage": "t2v"}).items] == [
        "a"
    ]
    changed = client.patch(CONFIG_MAP, "stiv", "a", {"data": {"text": "new"}})
    assert changed["data"] == {"text": "new"} and changed["metadata"]["uid"] == made["metadata"]["uid"]
    with pytest.raises(Conflict, match="modified"):
        stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"text": "old"}}
        client.patch(CONFIG_MAP, "stiv", "a", stale)
    with pytest.raises(Conflict, match="UID"):
        client.delete(CONFIG_MAP, "stiv", "a", uid="another")
    client.delete(CONFIG_MAP, "stiv", "a", uid=made["metadata"]["uid"])
    client.delete(CONFIG_MAP, "stiv", "a")
    with pytest.raises(NotFound):
        client.get(CONFIG_MAP, "stiv", "a")


def test_apply_changes_what_is_ours_and_leaves_what_is_anothers(client: ClusterClient, cluster: Cluster) -> None:
    client.apply(CONFIG_MAP, note("a", "one"))
    client.apply(CONFIG_MAP, note("a", "two"))
    cluster.objects[f"{PATH}/a"]["metadata"]["managedFields"].append({"manager": "ana", "leaves": [["data", "text"]]})
    client.apply(CONFIG_MAP, note("a", "two"))
    with pytest.raises(Conflict, match=r'conflict with "ana": .data.text'):
        client.apply(CONFIG_MAP, note("a", "three"))
    assert client.apply(CONFIG_MAP, note("a", "three"), force=True)["data"] == {"text": "three"}


@pytest.mark.parametrize(("status", "reason"), [(500, "InternalError"), (429, "TooManyRequests"), (503, "Unavailable")])
def test_a_server_that_is_busy_is_asked_again(
    client: ClusterClient, cluster: Cluster, status: int, reason: str
) -> None:
    for _ in range(2):
        cluster.fail_next("POST", "configmaps", status, reason, seconds=0)
    client.create(CONFIG_MAP, note("a"))
    assert [method for method, _ in cluster.requests] == ["POST"] * 3


def test_a_create_whose_answer_is_lost_is_seen_to_have_happened(client: ClusterClient, cluster: Cluster) -> None:
    cluster.fail_next("POST", "configmaps", 0, "", after=True)
    with pytest.raises(Conflict):
        client.create(CONFIG_MAP, note("a"))
    assert client.get(CONFIG_MAP, "stiv", "a")


def test_a_refusal_is_not_asked_again(client: ClusterClient, cluster: Cluster) -> None:
    cluster.forbidden.add(("create", "configmaps"))
    with pytest.raises(ClusterError, match='User "ana" cannot create') as refusal:
        client.create(CONFIG_MAP, note("a"))
    assert (refusal.value.status, len(cluster.requests)) == (403, 1)


def test_a_kind_that_is_not_installed_is_not_found(client: ClusterClient, cluster: Cluster) -> None:
    cluster.served = {""}
    with pytest.raises(NotFound):
        client.list(JOB_SET, "stiv")


def test_a_watch_tells_every_change_after_the_version_and_survives_nothing(
    client: ClusterClient, cluster: Cluster
) -> None:
    client.create(CONFIG_MAP, note("a", stage="t2v"))
    listing = client.list(CONFIG_MAP, "stiv")
    client.patch(CONFIG_MAP, "stiv", "a", {"data": {"text": "new"}})
    client.create(CONFIG_MAP, note("other", stage="t2i"))
    client.delete(CONFIG_MAP, "stiv", "a")
    watch = client.watch(CONFIG_MAP, "stiv", listing.version, labels={"stage": "t2v"})
    kinds = [next(watch).kind, next(watch).kind]
    assert kinds == ["MODIFIED", "DELETED"]
    assert next(watch).kind == "BOOKMARK"
    threading.Timer(0.1, cluster.drop_watches).start()
    assert not [change for change in watch if change.kind != "BOOKMARK"]  # it ends, and raises nothing


def test_a_watch_from_a_forgotten_version_says_so(client: ClusterClient, cluster: Cluster) -> None:
    version = client.list(CONFIG_MAP, "stiv").version
    client.create(CONFIG_MAP, note("a"))
    cluster.compact()
    with pytest.raises(WatchExpired):
        list(client.watch(CONFIG_MAP, "stiv", version))


def test_without_a_kubeconfig_the_way_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable kubeconfig.*set KUBECONFIG"):
        ClusterClient.connect(str(tmp_path / "none"))


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    client = ClusterClient.connect(str(kubeconfig(tmp_path, "http://127.0.0.1:9")), first_wait=0.001)
    with pytest.raises(ClusterError, match="cannot get configmaps 'a': no answer from the API server"):
        client.get(CONFIG_MAP, "stiv", "a")
