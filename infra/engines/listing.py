"""Published engines: which there are, and what is known of one.

It owns what is read off manifests, cards and, where there is the GPU, TensorRT's inspector; it changes nothing.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import JsonValue

from export.engines.card import PLAN, EngineCard, architecture_here, builder_here, require_runs_here
from export.engines.protocol import EngineMismatch
from export.engines.targets import TensorRtTarget
from export.tensorrt.library import has_driver
from export.tensorrt.plans import Plan, PlanUnusable
from infra.engines.export import PARITY_GATE
from infra.engines.provenance import parameters_of
from infra.engines.verify import fetch_engine
from infra.registry.layout import MANIFESTS
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from model.config import Config


@dataclass(slots=True, frozen=True)
class EngineRow:
    """One line of a list; it fetches no file."""

    digest: str
    stage: str
    runtime: str
    precision: str
    error_over_bound: float | None
    """Of its proof, None where it has none."""
    refs: tuple[str, ...]
    created_at: datetime


class EngineFacts(Config):
    """All that is known of one engine."""

    digest: str
    card: EngineCard
    metrics: dict[str, float]
    parents: dict[str, str]
    provenance: dict[str, JsonValue] | None
    runs_here: bool
    why_not: str | None
    plan: dict[str, JsonValue] | None
    """What TensorRT's inspector says, None where nothing is a plan or no GPU can be asked."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Facts as a table shows them."""
        yield from ((name, str(value)) for name, value in self.card.model_dump(mode="json").items())
        yield from ((f"parent {role}", digest) for role, digest in sorted(self.parents.items()))
        yield from ((name, f"{value:.4g}") for name, value in sorted(self.metrics.items()))
        yield "runs here", "yes" if self.runs_here else f"no: {self.why_not}"
        yield from ((f"plan {name}", str(value)) for name, value in (self.plan or {}).items() if name != "layers_json")


def list_engines(registry: Registry) -> list[EngineRow]:
    """Every published engine, newest first."""
    refs: dict[str, list[str]] = {}
    for name in registry.refs():
        refs.setdefault(registry.ref(name).digest, []).append(name)
    digests = [Path(key).stem for key in registry.store.list(MANIFESTS)]
    engines = [manifest for manifest in map(registry.manifest, digests) if manifest.kind == "engine"]
    rows = [_row(manifest, tuple(refs.get(manifest.digest, ()))) for manifest in engines]
    return sorted(rows, key=lambda row: row.created_at, reverse=True)


def inspect_engine(registry: Registry, ref: str, work: Path) -> EngineFacts:
    """The engine at `ref`, fetched and verified, and whether it runs here. Of a plan TensorRT is asked on its GPU."""
    fetched = fetch_engine(registry, ref, work)
    card, why_not = fetched.card, None
    try:
        require_runs_here(card, version=builder_here(card.target)[1], architecture=architecture_here(card.target))
    except (EngineMismatch, ValueError) as error:
        why_not = str(error)
    return EngineFacts(
        digest=fetched.manifest.digest,
        card=card,
        metrics=fetched.manifest.metrics,
        parents=fetched.manifest.parents,
        provenance=fetched.manifest.provenance,
        runs_here=why_not is None,
        why_not=why_not,
        plan=_plan_facts(card, fetched.folder) if why_not is None else None,
    )


def _plan_facts(card: EngineCard, folder: Path) -> dict[str, JsonValue] | None:
    target = card.target
    if not isinstance(target, TensorRtTarget) or not has_driver():
        return None
    try:
        facts = Plan((folder / PLAN).read_bytes(), target.runtime, gpu=target.gpu).facts()
    except PlanUnusable as error:
        raise EngineMismatch(f"{error}; build the engine again for this machine") from None
    return {
        "layers": facts.layers,
        "profiles": facts.profiles,
        "inputs": dict(facts.inputs),
        "outputs": dict(facts.outputs),
        "ranges": json.loads(json.dumps(dict(facts.ranges))),
        "refittable": facts.refittable,
        "streamable_bytes": facts.streamable_bytes,
        "layers_json": facts.layer_information,
    }


def _types(asked: Mapping[str, JsonValue]) -> str:
    """Precision of the graph, and what its linear layers are quantised to."""
    precision, quantization = (str(asked.get(name, "")) for name in ("precision", "quantization"))
    return precision if quantization in ("", "none") else f"{precision}, {quantization}"


def _row(manifest: Manifest, refs: tuple[str, ...]) -> EngineRow:
    asked: Mapping[str, JsonValue] = parameters_of(manifest)
    target = asked.get("target")
    return EngineRow(
        digest=manifest.digest,
        stage=str((manifest.recipe or {}).get("name", "")),
        runtime=str(target.get("runtime")) if isinstance(target, dict) else "",
        precision=_types(asked),
        error_over_bound=manifest.metrics.get(PARITY_GATE[0].metric),
        refs=refs,
        created_at=manifest.created_at,
    )
