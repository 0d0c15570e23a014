"""What an engine is made from: all that decides its bytes, so that equal inputs need no second build.

It owns the list and its digest; it knows nothing of stores or of builds.
"""

import hashlib
import json
from typing import Any

from pydantic import JsonValue

from export.engines.card import EngineCard
from export.profiles import ShapeProfile
from infra.registry.records import Code
from model.config import Config


class GraphInputs(Config):
    """Of an exported graph: known before a network is traced."""

    recipe_sha256: str
    weights_sha256: str
    precision: str
    profile: ShapeProfile
    code: str
    """Version and commit of this package."""
    exporter: dict[str, str]
    """Library -> version, of all that write the file."""

    @property
    def digest(self) -> str:
        return _digest("graph", self)


class EngineInputs(Config):
    """Of an engine: known before a plan is built."""

    onnx_sha256: str
    weights_sha256: str
    recipe_sha256: str
    precision: str
    quantization: str
    profile: ShapeProfile
    builder: str
    version: str
    architectures: tuple[str, ...]
    target: dict[str, JsonValue]
    """Its runtime and the flags of its build."""
    code: str

    @property
    def digest(self) -> str:
        return _digest("engine", self)

    @classmethod
    def of(cls, card: EngineCard, profile: ShapeProfile, code: Code) -> "EngineInputs":
        return cls(
            onnx_sha256=card.onnx_sha256,
            weights_sha256=card.weights_sha256,
            recipe_sha256=card.recipe_sha256,
            precision=card.precision,
            quantization=card.quantization,
            profile=profile,
            builder=card.builder,
            version=card.version,
            architectures=card.architectures,
            target=card.target.model_dump(mode="json"),
            code=spelt(code),
        )


def spelt(code: Code) -> str:
    return code.version if code.commit is None else f"{code.version}+{code.commit}"


def is_known(code: Code) -> bool:
    """Whether the code has a name. A checkout with changes has none, so what it made stands for nothing else."""
    return not code.modified


def _digest(kind: str, inputs: Config) -> str:
    tree: dict[str, Any] = {"kind": kind, **inputs.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
