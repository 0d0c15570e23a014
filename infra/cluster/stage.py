"""A stage on a cluster, from its recipe to its promoted checkpoint, as `infra.launch.stage` has it on one machine.

It owns that order; how a gang is kept going is `follow`'s, what its pods do is `node`'s.
"""

from collections.abc import Callable

from infra.cluster.client import ClusterClient
from infra.cluster.config import ClusterConfig
from infra.cluster.follow import Follower, Look, follow
from infra.cluster.gang import ClusterGang
from infra.cluster.journal import GangJournal
from infra.cluster.request import GangRequest
from infra.registry.records import Ref
from infra.registry.registry import Registry
from model.recipe import StageRecipe


def request_for(recipe: StageRecipe, registry: Registry, cluster: ClusterConfig) -> GangRequest:
    """What is asked of the cluster, from what the refs point at now.

    Raises ArtifactNotFound where an input has not been promoted; ValueError where the stage does not fit the nodes.
    """
    from infra.launch.stage import resolve_inputs

    cluster.layout(recipe)
    inputs = {role: manifest.digest for role, manifest in resolve_inputs(recipe, registry).items()}
    return GangRequest(recipe, inputs, cluster)


def train_on_cluster(
    client: ClusterClient,
    request: GangRequest,
    registry: Registry,
    *,
    who: str,
    start: bool = True,
    on_look: Callable[[Look], None] = lambda _: None,
) -> Ref:
    """Start the gang or attach to it, follow it to its end and promote what it published.

    Calling it again after an interruption goes on; with `start` false it only attaches.

    Raises:
        ClusterError: the API server refused. NotFound: there is no such gang to attach to.
        GangFailed: the gang failed or was given up; it says why.
        PromotionRefused: the gate did not hold; the checkpoint is published, the ref is as it was.
    """
    from infra.launch.stage import promote_trained

    journal = GangJournal(registry.store, request.name)
    outcome = journal.outcome()
    if outcome is None:
        with ClusterGang(client, request) as gang:
            if start:
                known = journal.progress()
                gang.launch(save_seconds=None if known is None else known.save_seconds)
            else:
                gang.refresh()
            follow(Follower(gang, journal), on_look)
        outcome = journal.outcome()
    if outcome is None:
        raise RuntimeError(
            f"gang '{request.name}' succeeded and left nothing under gangs/{request.name}/ in {registry.store.url}: do"
            " its pods and this process use one store?"
        )
    return promote_trained(request.recipe, registry, outcome.checkpoint, who=who)
