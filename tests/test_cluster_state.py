"""A gang's state follows from what is there, in whatever order one hears of it."""

from random import Random
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from infra.cluster.client import Change
from infra.cluster.jobset import job_set
from infra.cluster.objects import JOB_SET, POD
from infra.cluster.state import GangView
from tests.api_server import Cluster
from tests.cluster_recipes import request
from tests.cluster_world import World

REQUEST = request()
ACTS = ("place", "run", "restart", "crash", "suspend", "admit", "unschedulable", "lose a pod")
ENDS = ("complete", "fail", "delete", "delete and make anew", "nothing")


def make(cluster: Cluster) -> World:
    world = World(cluster, REQUEST.name)
    cluster.add(world.job_set, dict(job_set(REQUEST, 2, 60)))
    world.make_pods()
    return world


def act(world: World, what: str) -> None:
    suspended = world.cluster.objects[world.job_set]["spec"].get("suspend", False)
    if what == "admit" and suspended:
        world.admit()
    elif not suspended and what != "admit":
        if what == "lose a pod":
            world.pod(0, metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"})
        elif what == "crash":
            world.restart(crash=True)
        else:
            getattr(world, what)()


def history(acts: list[str], end: str) -> Cluster:
    """What a cluster goes through."""
    cluster = Cluster()
    world = make(cluster)
    for what in acts:
        act(world, what)
    if end in ("complete", "fail"):
        getattr(world, end)()
    elif end.startswith("delete"):
        cluster.drop(world.job_set)
    if end == "delete and make anew":
        make(cluster)
    return cluster


def now(cluster: Cluster, kind: Any) -> list[dict[str, Any]]:
    return [thing for path, thing in cluster.objects.items() if path.startswith(kind.path("stiv"))]


def changes(cluster: Cluster) -> list[Change]:
    return [Change(kind, thing, str(version)) for version, kind, _, thing in cluster.history]  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink))
@given(st.lists(st.sampled_from(ACTS), max_size=8), st.sampled_from(ENDS), st.randoms())
def test_changes_in_any_order_and_again_lead_to_the_state_that_a_list_shows(
    acts: list[str], end: str, chance: Random
) -> None:
    cluster = history(acts, end)
    told = changes(cluster)
    view = GangView(REQUEST.name)
    for change in chance.sample(told * 2, k=2 * len(told)):
        view.apply(change)
    fresh = GangView(REQUEST.name)
    if end == "delete":
        fresh.apply(told[0])
    for kind in (JOB_SET, POD):
        fresh.relist(kind, now(cluster, kind), str(cluster.version))
    assert view.standing() == fresh.standing()
    assert (end, view.standing().state) in {
        ("complete", "succeeded"),
        ("fail", "failed"),
        ("delete", "lost"),
        ("delete and make anew", "pending"),
        *(("nothing", state) for state in ("pending", "suspended", "starting", "running", "restarting")),
    }


@settings(max_examples=50, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink))
@given(st.lists(st.sampled_from(ACTS), max_size=8), st.sampled_from(ENDS), st.randoms())
def test_changes_that_a_cut_watch_lost_are_made_good_by_a_list(acts: list[str], end: str, chance: Random) -> None:
    cluster = history(acts, end)
    told = changes(cluster)
    view = GangView(REQUEST.name)
    view.apply(told[0])
    for change in chance.sample(told, k=chance.randint(0, len(told))):
        view.apply(change)
    for kind in chance.sample([JOB_SET, POD], k=2):
        view.relist(kind, now(cluster, kind), str(cluster.version))
    fresh = GangView(REQUEST.name)
    fresh.apply(told[0])
    for kind in (JOB_SET, POD):
        fresh.relist(kind, now(cluster, kind), str(cluster.version))
    assert view.standing() == fresh.standing()


def test_a_list_that_was_made_before_the_gang_does_not_lose_it() -> None:
    cluster = Cluster()
    world = make(cluster)
    view = GangView(REQUEST.name)
    made = cluster.objects[world.job_set]
    view.relist(JOB_SET, [made], made["metadata"]["resourceVersion"])
    view.relist(JOB_SET, [], "1")
    assert view.standing().state == "pending"


def test_the_states_of_a_gangs_life() -> None:
    cluster = Cluster()
    world = make(cluster)
    seen: list[str] = []
    for what in ("", "suspend", "admit", "place", "run", "lose a pod", "restart", "run", "crash", "run"):
        if what:
            act(world, what)
        fresh = GangView(REQUEST.name)
        for kind in (JOB_SET, POD):
            fresh.relist(kind, now(cluster, kind), str(cluster.version))
        seen.append(fresh.standing().state)
    first = ["pending", "suspended", "pending", "starting", "running", "restarting", "restarting", "running"]
    assert seen == [*first, "restarting", "running"]
    assert (fresh.standing().restarts, fresh.standing().crashes) == (2, 1)
