"""The registry as its rivals use it: publish files, promote them, look what is promoted.

It owns what such an artifact looks like; it knows nothing of who calls.
"""

from collections.abc import Mapping
from pathlib import Path

from infra.registry.registry import Registry
from model.config import GateRule

RULES = (GateRule(metric="heldout_loss", op="<", bound=0.5),)


def publish(registry: Registry, files: Mapping[str, Path]) -> str:
    """The digest of a checkpoint that passes its gate."""
    return registry.publish("checkpoint", files, rules=RULES, metrics={"heldout_loss": 0.4}).digest


def promote(registry: Registry, ref: str, digest: str, *, who: str) -> str | None:
    """The digest that was replaced."""
    return registry.promote(ref, digest, who=who, why="rivalry").previous
