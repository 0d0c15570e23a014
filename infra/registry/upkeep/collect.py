"""Garbage collection in two phases: what nothing reaches is marked, and deleted only if it still is after a grace.

It owns what counts as reachable and the durable list of marks. It deletes objects of the registry's own layout only,
and knows nothing of what they mean.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime

from infra.registry import layout
from infra.registry.records import Manifest, Record, Ref, parse
from infra.registry.registry import Registry
from infra.registry.upkeep.claims import live_claims, sweeping
from infra.store.artifacts import AlreadyExists, ArtifactNotFound, Conflict, blob_key

logger = logging.getLogger(__name__)

BLOBS = "cas/"
KEEP = timedelta(days=30)
GRACE = timedelta(days=7)
SWEEP_LASTS = timedelta(minutes=10)
SKEW = timedelta(minutes=5)
"""How far the clocks of two machines that collect may be apart."""
_THREADS = 8


class Marks(Record):
    """Objects that nothing reaches, and since when that is known."""

    generation: int
    since: dict[str, AwareDatetime]


@dataclass(frozen=True, slots=True)
class Collection:
    """What a run found or did: keys and their bytes."""

    unreachable: Mapping[str, int]
    """Nothing reaches them now."""
    due: Mapping[str, int]
    """Those that were marked a grace ago or longer: what a sweep deletes, or has deleted."""


def survey(registry: Registry, *, keep: timedelta = KEEP, grace: timedelta = GRACE) -> Collection:
    """What `mark` would mark and `sweep` would delete; nothing is written."""
    unreachable = _unreachable(registry, _stored(registry), keep)
    return _collection(registry, unreachable, _due(registry, unreachable, grace))


def mark(registry: Registry, *, keep: timedelta = KEEP, grace: timedelta = GRACE) -> Collection:
    """Write down what nothing reaches. What was marked before keeps its date; what is reached again loses its mark."""
    unreachable = _unreachable(registry, _stored(registry), keep)
    version, marks = _marks(registry)
    now = datetime.now(UTC)
    since = {key: marks.since.get(key, now) for key in unreachable}
    data = Marks(generation=marks.generation + 1, since=since).canonical()
    try:
        if version is None:
            registry.store.create(layout.MARKS, data)
        else:
            registry.store.swap(layout.MARKS, data, version)
    except (AlreadyExists, Conflict):
        raise Conflict("somebody else is marking at this moment; try again") from None
    return _collection(registry, unreachable, _due(registry, unreachable, grace))


def sweep(registry: Registry, *, who: str, keep: timedelta = KEEP, grace: timedelta = GRACE) -> Collection:
    """Delete what was marked a grace ago or longer and is still unreachable, manifests before the files they name.

    It ends after `SWEEP_LASTS` at the latest; what is left is the next one's. Raises Conflict while another is at it.
    """
    due = _due(registry, _marks(registry)[1].since, grace)
    if not due:
        return Collection({}, {})
    deleted: dict[str, int] = {}
    with sweeping(registry.store, due, who=who, lasts=SWEEP_LASTS) as running:
        # Claims first: a publication that ends in between has its manifest in the store by then.
        claims = live_claims(registry.store)
        doomed = _doomed(registry, due, keep, claims)
        sizes = _sizes(registry, doomed)
        for kind in (layout.MANIFESTS, layout.SIGNATURES, BLOBS):
            for key in (key for key in doomed if key.startswith(kind)):
                if datetime.now(UTC) >= running.stops:
                    break
                registry.store.delete(key)
                deleted[key] = sizes[key]
    _forget(registry, due)
    registry.store.clear_unfinished(max(grace, timedelta(days=1)))
    logger.info("deleted %d objects, %d bytes", len(deleted), sum(deleted.values()))
    return Collection({}, deleted)


def roots(registry: Registry, keep: timedelta) -> set[str]:
    """Digests that are in use: what refs point at and pointed at before that, and what a ref left within `keep`."""
    oldest = datetime.now(UTC) - keep
    found: set[str] = set()
    current = {name: registry.ref(name) for name in registry.refs()}
    replaced: dict[tuple[str, int], datetime] = {}
    keys = registry.store.list(layout.LOG)
    with ThreadPoolExecutor(_THREADS) as pool:
        logged = [
            parse(Ref, stored, key) for key, stored in zip(keys, pool.map(registry.store.read, keys), strict=True)
        ]
    for move in logged:
        if move.previous_generation is not None:
            replaced[move.name, move.previous_generation] = move.when
    for move in current.values():
        found |= {move.digest} | ({move.previous} if move.previous else set())
    for move in logged:
        # A move that was never made, or is being made, has no successor: it counts from when it was written down.
        if max(move.when, replaced.get((move.name, move.generation), move.when)) >= oldest:
            found.add(move.digest)
    return found


def reached(manifests: Mapping[str, Manifest], from_digests: Iterable[str]) -> set[str]:
    """Keys of the manifests that are reached through parents, of their files and of their signatures' folder."""
    keys: set[str] = set()
    waiting = [digest for digest in from_digests]
    seen: set[str] = set()
    while waiting:
        digest = waiting.pop()
        if digest in seen or digest not in manifests:
            continue
        seen.add(digest)
        manifest = manifests[digest]
        keys.add(layout.manifest_key(digest))
        keys |= {blob_key(blob.digest) for blob in manifest.files.values()}
        waiting += manifest.parents.values()
    return keys


def all_manifests(registry: Registry) -> dict[str, Manifest]:
    """Every manifest of the store, read and verified; a corrupt one is an error, for nobody knows what it names."""

    def read(digest: str) -> Manifest | None:
        try:
            return registry.manifest(digest)
        except ArtifactNotFound:  # a sweep was quicker
            return None

    digests = [layout.manifest_digest(key) for key in registry.store.list(layout.MANIFESTS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(digests, pool.map(read, digests), strict=True)
        return {digest: manifest for digest, manifest in found if manifest is not None}


def _unreachable(registry: Registry, keys: Iterable[str], keep: timedelta) -> list[str]:
    held = _held(registry, all_manifests(registry), keep)
    return [key for key in keys if key not in held and _owner(key) not in held]


def _doomed(registry: Registry, due: Sequence[str], keep: timedelta, claims: set[str]) -> list[str]:
    """What of `due` may be deleted now: neither in use, nor claimed, nor named by a manifest that stays."""
    manifests = all_manifests(registry)
    held = _held(registry, manifests, keep) | claims
    claimed = {layout.manifest_digest(key) for key in claims if key.startswith(layout.MANIFESTS)}
    going = set(due) - held
    staying = {digest for digest in manifests if layout.manifest_key(digest) not in going}
    held |= reached(manifests, staying | claimed)
    return [key for key in due if key not in held and _owner(key) not in held]


def _held(registry: Registry, manifests: Mapping[str, Manifest], keep: timedelta) -> set[str]:
    oldest = datetime.now(UTC) - keep
    young = {digest for digest, manifest in manifests.items() if manifest.created_at >= oldest}
    return reached(manifests, roots(registry, keep) | young)


def _owner(key: str) -> str | None:
    """The manifest that a signature belongs to."""
    if not key.startswith(layout.SIGNATURES):
        return None
    return layout.manifest_key(key.removeprefix(layout.SIGNATURES).partition("/")[0])


def _stored(registry: Registry) -> list[str]:
    # Listed before reachability is worked out: what is stored afterwards is not looked at in this run.
    return [key for kind in (layout.MANIFESTS, layout.SIGNATURES, BLOBS) for key in registry.store.list(kind)]


def _marks(registry: Registry) -> tuple[str | None, Marks]:
    try:
        stored = registry.store.read(layout.MARKS)
    except ArtifactNotFound:
        return None, Marks(generation=0, since={})
    return stored.version, parse(Marks, stored, layout.MARKS)


def _due(registry: Registry, keys: Iterable[str], grace: timedelta) -> list[str]:
    now = datetime.now(UTC)
    since = _marks(registry)[1].since
    ahead = max(since.values(), default=now) - now
    if ahead > SKEW:
        raise ValueError(
            f"the marks of {registry.store.url} are {ahead} ahead of this machine's clock; set the clocks right before"
            " anything is deleted"
        )
    return [key for key in keys if key in since and since[key] <= now - grace]


def _forget(registry: Registry, keys: Iterable[str]) -> None:
    """An object that comes back one day has a grace of its own."""
    version, marks = _marks(registry)
    gone = set(keys)
    since = {key: when for key, when in marks.since.items() if key not in gone}
    if version is not None:
        data = Marks(generation=marks.generation + 1, since=since).canonical()
        try:
            registry.store.swap(layout.MARKS, data, version)
        except Conflict:
            logger.info("somebody marks at this moment and looks for itself what is still there")


def _sizes(registry: Registry, keys: Sequence[str]) -> dict[str, int]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(keys, (size or 0 for size in pool.map(registry.store.size, keys)), strict=True))


def _collection(registry: Registry, unreachable: Sequence[str], due: Sequence[str]) -> Collection:
    sizes = _sizes(registry, unreachable)
    return Collection(sizes, {key: sizes[key] for key in due})
