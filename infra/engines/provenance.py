"""Where an engine comes from, as an in-toto statement with a SLSA v1 predicate, for its manifest.

It owns that form; it signs nothing: a signature covers the manifest, and the statement with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from infra.engines.inputs import EngineInputs, GraphInputs
from infra.registry.records import Manifest
from infra.store.artifacts import blob_of

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "stiv-platform/engine/v1"
"""The build type: `externalParameters` are what was asked for, `internalParameters` name the two keys of reuse."""


@dataclass(slots=True, frozen=True)
class BuildRecord:
    """One making of an engine."""

    graph: GraphInputs
    engine: EngineInputs
    parents: Mapping[str, str]
    """Role -> digest of the manifests it was made from."""
    started: datetime
    gpu: str | None
    """Name of the GPU that built it, None without one."""
    timing_cache: str | None
    """sha256 of what the builder measured, None where it measures nothing."""


def statement(record: BuildRecord, files: Mapping[str, Path]) -> dict[str, JsonValue]:
    """The statement about the engine's `files`."""
    engine, graph = record.engine, record.graph
    subjects: list[JsonValue] = [_resource(name, blob_of(path).digest) for name, path in sorted(files.items())]
    dependencies: list[JsonValue] = [
        _resource("onnx", engine.onnx_sha256),
        _resource("weights", engine.weights_sha256),
        _resource("recipe", engine.recipe_sha256),
        *(_resource(f"manifest/{role}", digest) for role, digest in sorted(record.parents.items())),
    ]
    if record.timing_cache is not None:
        dependencies.append(_resource("timing-cache", record.timing_cache))
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {
                    "target": engine.target,
                    "precision": engine.precision,
                    "quantization": engine.quantization,
                    "profile": engine.profile.model_dump(mode="json"),
                },
                "internalParameters": {"graphKey": graph.digest, "engineKey": engine.digest},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {
                    "id": f"stiv-platform/{engine.builder}",
                    "version": {engine.builder: engine.version, "stiv-platform": engine.code, **graph.exporter},
                },
                "metadata": {
                    "startedOn": record.started.isoformat(),
                    "finishedOn": datetime.now(UTC).isoformat(),
                    "architectures": list(engine.architectures),
                    "gpu": record.gpu,
                },
            },
        },
    }


def keys_of(manifest: Manifest) -> list[str]:
    """The digests of the inputs that a manifest says it was made from, of its graph and of its engine."""
    inner = _inside(manifest.provenance, "predicate", "buildDefinition", "internalParameters")
    return [str(value) for value in inner.values()]


def parameters_of(manifest: Manifest) -> Mapping[str, JsonValue]:
    """What was asked for when the engine was made: target, precision and profile."""
    return _inside(manifest.provenance, "predicate", "buildDefinition", "externalParameters")


def _inside(tree: Mapping[str, JsonValue] | None, *path: str) -> Mapping[str, JsonValue]:
    found: JsonValue = dict(tree or {})
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _resource(name: str, sha256: str) -> dict[str, JsonValue]:
    return {"name": name, "digest": {"sha256": sha256}}
