"""A new checkpoint in an engine that stands: the same graph and plan around other weights, proven and published.

It owns which engine a checkpoint fits into; it traces nothing and builds nothing.
"""

from datetime import UTC, datetime
from pathlib import Path

from export.bundle import MODEL
from export.engines.card import LOG, PLAN, describe
from export.engines.protocol import EngineMismatch
from export.engines.targets import TensorRtTarget
from export.engines.weights import profile_of, read_graph, write_refitted
from export.onnx import recipe_digest
from export.tensorrt.plans import Plan
from infra.engines.build import Built
from infra.engines.export import Draft, ExportedEngine, publish_draft, recipe_for, require_served
from infra.engines.graph import Graph, graph_inputs
from infra.engines.verify import FetchedEngine, fetch_engine
from infra.registry.registry import Registry
from infra.trained import Trained, fetch_trained
from model.network.stiv import STIV
from model.recipe import StageRecipe


def refit_engine(registry: Registry, engine: str, checkpoint: str, work: Path, *, who: str) -> ExportedEngine:
    """Publish the engine at `engine` around the weights of `checkpoint`, proven, and move `engine/candidate`.

    Raises:
        EngineMismatch: the checkpoint's network is another one, or the plan keeps its weights. ParityFailed: the
        refitted engine is wrong; nothing is published.
    """
    started = datetime.now(UTC)
    fetched = fetch_engine(registry, engine, work)
    trained = fetch_trained(registry, checkpoint, work)
    recipe = recipe_for(trained.recipe, fetched.card.target)
    require_served(recipe)
    graph = _refitted_graph(registry, fetched, trained, recipe, work)
    card = describe(graph.model, fetched.card.target, architectures=fetched.card.architectures)
    draft = Draft(trained, recipe, graph, card, _refitted_plan(fetched, graph, work), started)
    why = f"engine {fetched.manifest.digest[:16]} refitted from {checkpoint}"
    return publish_draft(registry, draft, work, who=who, why=why)


def _refitted_graph(
    registry: Registry, fetched: FetchedEngine, trained: Trained, recipe: StageRecipe, work: Path
) -> Graph:
    source, network = fetched.folder / MODEL, trained.network()
    profile, inputs = profile_of(read_graph(source), source), graph_inputs(registry, network, recipe)
    _require_same_shapes(fetched, inputs.profile == profile and inputs.precision == fetched.card.precision, network)
    said = {
        "stiv.stage": recipe.name,
        "stiv.recipe_sha256": recipe_digest(recipe),
        "stiv.weights_sha256": inputs.weights_sha256,
    }
    model = work / "refitted" / MODEL
    write_refitted(source, model, network.state_dict(), said)
    return Graph(model, profile, inputs, seconds=0.0)


def _require_same_shapes(fetched: FetchedEngine, same: bool, network: STIV) -> None:
    if not same:
        raise EngineMismatch(
            f"engine {fetched.manifest.digest[:16]} takes other shapes or another precision than this checkpoint's"
            f" recipe exports (depth {network.config.depth}, hidden_size {network.config.hidden_size}); export it anew"
        )


def _refitted_plan(fetched: FetchedEngine, graph: Graph, work: Path) -> Built:
    target = fetched.card.target
    if not isinstance(target, TensorRtTarget):
        return Built()
    if target.build.weights == "refit_stripped":  # it carries no weights: they are read from the graph
        return Built({name: fetched.folder / name for name in (PLAN, LOG)})
    plan = Plan((fetched.folder / PLAN).read_bytes(), target.runtime, gpu=target.gpu)
    plan.refit_from(graph.model)
    (work / PLAN).write_bytes(plan.serialized())
    return Built({PLAN: work / PLAN, LOG: fetched.folder / LOG})
