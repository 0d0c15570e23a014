"""What a target's engine is beside its graph: a plan where it is TensorRT's, nothing where it is not.

It owns the build with the store's timing cache, and the files it leaves; how a plan is built is `export.tensorrt`'s.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from export.engines.card import LOG, PLAN, EngineCard, architecture_here, describe
from export.engines.targets import AnyTarget, TensorRtTarget
from export.tensorrt import library
from export.tensorrt.builder import build_plan, merge_timing_caches
from export.tensorrt.listeners import OnProgress, Watch
from export.tensorrt.options import measures
from infra.engines.graph import Graph
from infra.engines.timing import TimingCaches
from infra.store.artifacts import ArtifactStore
from model.recipe import StageRecipe


@dataclass(slots=True, frozen=True)
class Built:
    """The files of an engine beside its graph."""

    files: Mapping[str, Path] = field(default_factory=lambda: {})
    figures: Mapping[str, float] = field(default_factory=lambda: {})
    timing_cache: str | None = None
    """sha256 of what the builder knew when it was done."""


def card_of(graph: Graph, target: AnyTarget) -> EngineCard:
    """What the engine will be, before it is built."""
    wanted = target.build.architectures if isinstance(target, TensorRtTarget) else ()
    here = architecture_here(target) if isinstance(target, TensorRtTarget) else None
    return describe(graph.model, target, architectures=wanted or ((here,) if here else ()))


def build(
    store: ArtifactStore,
    graph: Graph,
    recipe: StageRecipe,
    target: AnyTarget,
    work: Path,
    on_progress: OnProgress | None = None,
) -> Built:
    """Build the plan of `target` into `work`, or nothing where the graph itself is run."""
    if not isinstance(target, TensorRtTarget):
        return Built()
    caches, name, gpu = TimingCaches(store), target.runtime, library.gpu_name(target.gpu)
    uses_cache = measures(name) and gpu is not None
    known = caches.read(name, library.version(name), gpu) if uses_cache and gpu else b""
    plan = build_plan(
        graph.model,
        graph.profile,
        graph.profile.ranges(recipe),
        library=name,
        options=target.build,
        timing_cache=known,
        watch=Watch(work / LOG, on_progress),
    )
    (work / PLAN).write_bytes(plan.plan)
    if uses_cache and gpu:
        caches.add(name, plan.version, gpu, plan.timing_cache, lambda a, b: merge_timing_caches(name, a, b))
    return Built(
        files={PLAN: work / PLAN, LOG: work / LOG},
        figures={"build_seconds": plan.seconds, "plan_bytes": float(len(plan.plan))},
        timing_cache=hashlib.sha256(plan.timing_cache).hexdigest() if plan.timing_cache else None,
    )
