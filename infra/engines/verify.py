"""A published engine once more: opened as a server opens it, and compared with its checkpoint.

It owns fetching and what a plan that was built elsewhere still needs to be served; comparing is `export.parity`'s.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from export.bundle import MODEL, PARITY
from export.engines.card import (
    CARD,
    LOG,
    PLAN,
    EngineCard,
    architecture_here,
    builder_here,
    read_card,
    require_runs_here,
)
from export.engines.opening import open_bundle
from export.engines.protocol import RefittableEngine
from export.engines.torch import TorchEngine
from export.engines.weights import profile_of, read_graph
from export.parity.check import check_parity
from export.parity.inputs import ParityInputs
from export.parity.report import ParityReport
from infra.engines.build import Built
from infra.engines.export import Draft, ExportedEngine, publish_draft
from infra.engines.graph import Graph, graph_inputs
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.trained import fetch_trained
from model.recipe import loads_stage
from model.text import load_text_encoder


@dataclass(slots=True, frozen=True)
class FetchedEngine:
    """A published engine in a folder of this machine, every digest verified."""

    manifest: Manifest
    folder: Path

    @property
    def card(self) -> EngineCard:
        return read_card(self.folder / CARD)

    def open(self) -> RefittableEngine:
        """The engine, after every check a server makes."""
        return open_bundle(self.folder)[1]


def fetch_engine(registry: Registry, ref: str, work: Path) -> FetchedEngine:
    """The engine at `ref` below `work`; a registry with a trust policy hands out no unsigned one."""
    manifest = registry.verified(ref)
    if manifest.kind != "engine":
        raise ValueError(f"'{ref}' is of kind '{manifest.kind}'; this takes an engine, such as engine/candidate")
    return FetchedEngine(manifest, registry.fetch(manifest, work / "engines" / manifest.digest[:16]))


def is_proven(registry: Registry, ref: str) -> bool:
    """Whether the engine at `ref` carries a report of its parity."""
    return PARITY in registry.resolve(ref).files


def verify_engine(registry: Registry, ref: str, work: Path) -> ParityReport:
    """Open a proven engine on this machine and compare it with its checkpoint in PyTorch.

    Raises:
        EngineMismatch: it does not run here. ParityFailed: it does not compute what it should here.
    """
    fetched = fetch_engine(registry, ref, work)
    trained = fetch_trained(registry, fetched.manifest.parents["checkpoint"], work)
    bundle, engine, profile = open_bundle(fetched.folder)
    return check_parity(
        TorchEngine(trained.network()),
        engine,
        ParityInputs(profile, bundle.recipe, trained.codec(), load_text_encoder(bundle.recipe.text)),
        subject=fetched.card.onnx_sha256,
        precision=fetched.card.coarsest,
    )


def prove_plan(registry: Registry, ref: str, work: Path, *, who: str) -> ExportedEngine:
    """Prove a plan that a machine without its GPU built: the same plan, published again with its report, and promoted.

    Raises:
        EngineMismatch: this machine cannot run it either; the message says which can.
    """
    fetched, started = fetch_engine(registry, ref, work), datetime.now(UTC)
    if PARITY in fetched.manifest.files:
        raise ValueError(f"engine {fetched.manifest.digest[:16]} is proven already; `stiv engine verify` checks it")
    card = fetched.card
    require_runs_here(card, version=builder_here(card.target)[1], architecture=architecture_here(card.target))
    trained = fetch_trained(registry, fetched.manifest.parents["checkpoint"], work)
    recipe, model = loads_stage(json.dumps(fetched.manifest.recipe)), fetched.folder / MODEL
    profile = profile_of(read_graph(model), model)
    graph = Graph(model, profile, graph_inputs(registry, trained.network(), recipe), seconds=0.0)
    files = {name: fetched.folder / name for name in (PLAN, LOG)}
    figures = {name: fetched.manifest.metrics[name] for name in ("build_seconds", "plan_bytes")}
    draft = Draft(trained, recipe, graph, card, Built(files, figures), started)
    return publish_draft(registry, draft, work, who=who, why=f"proven where it runs: {fetched.manifest.digest[:16]}")
