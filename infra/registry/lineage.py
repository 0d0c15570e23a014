"""Lineage: an artifact and all it was made from, back to the first stage, its data set and codec.

It owns the graph and what each node says; how it is drawn is the caller's.
"""

from dataclasses import dataclass

from infra.registry.records import Manifest, Ref
from infra.registry.registry import Registry
from infra.store.artifacts import ArtifactNotFound


@dataclass(frozen=True, slots=True)
class Node:
    """One artifact of the graph; `manifest` is None of one that is no longer in the store."""

    digest: str
    manifest: Manifest | None
    moves: tuple[Ref, ...]
    """Every time a ref was pointed at it, oldest first."""

    @property
    def title(self) -> str:
        if self.manifest is None:
            return f"missing {self.digest[:16]}"
        name = (self.manifest.recipe or {}).get("name")
        return f"{self.manifest.kind} {name or ''}".strip() + f" {self.digest[:16]}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """Every reason a failed gate of it was passed over for."""
        told = dict.fromkeys(f"{move.name}: {move.override} ({move.who})" for move in self.moves if move.override)
        return tuple(told)


@dataclass(frozen=True, slots=True)
class Edge:
    """`child` was made from `parent`, as its `role`."""

    child: str
    parent: str
    role: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """The graph of what `root` was made from; nodes in the order of their digests' first mention from the root."""

    root: str
    nodes: dict[str, Node]
    edges: tuple[Edge, ...]

    def parents(self, digest: str) -> tuple[Edge, ...]:
        return tuple(edge for edge in self.edges if edge.child == digest)


def lineage(registry: Registry, ref_or_digest: str) -> Lineage:
    """Follow the parents of an artifact to the end. A parent that is gone stays in the graph, as missing."""
    root = registry.look_up(ref_or_digest).digest
    moves = _moves(registry)
    nodes: dict[str, Node] = {}
    edges: list[Edge] = []
    waiting = [root]
    while waiting:
        digest = waiting.pop(0)
        if digest in nodes:
            continue
        try:
            manifest = registry.manifest(digest)
        except ArtifactNotFound:
            manifest = None
        nodes[digest] = Node(digest, manifest, tuple(moves.get(digest, ())))
        for role, parent in (manifest.parents if manifest else {}).items():
            edges.append(Edge(digest, parent, role))
            waiting.append(parent)
    return Lineage(root, nodes, tuple(edges))


def _moves(registry: Registry) -> dict[str, list[Ref]]:
    """Digest -> every move to it that took place, oldest first."""
    found: dict[str, list[Ref]] = {}
    for name in registry.refs():
        for move in reversed(registry.history(name)):
            found.setdefault(move.digest, []).append(move)
    return found
