"""Audit of a registry: every manifest read, every file it names hashed anew, every ref followed.

It owns what is looked at and what is wrong with it; it mends nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field

from infra.registry import layout
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.registry.signing import signatures
from infra.registry.signing.trust import SignatureRefused
from infra.store.artifacts import ArtifactCorrupt, ArtifactNotFound, blob_key

WORKERS = 8

OnProgress = Callable[[int, int], None]
"""(bytes hashed, bytes to hash)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is missing, corrupt or unsigned, and whom it concerns."""

    key: str
    what: str
    of: tuple[str, ...] = ()
    """Refs and artifacts that need it."""


@dataclass(slots=True)
class Audit:
    """What was looked at and what was wrong with it."""

    manifests: int = 0
    files: int = 0
    size: int = 0
    signatures: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])

    def as_tree(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def audit(
    registry: Registry,
    refs: Sequence[str] = (),
    *,
    workers: int = WORKERS,
    on_progress: OnProgress = lambda done, total: None,
) -> Audit:
    """Hash all that is reachable from `refs` (names or digests), or everything published where none is named.

    Signatures under `release/` are checked where the registry has keys to trust.
    """
    found = Audit()
    wanted = _starts(registry, refs, found)
    manifests = _follow(registry, wanted, found)
    found.manifests = len(manifests)
    _hash_files(registry, manifests, workers, found, on_progress)
    if registry.trust is not None:
        for ref in (name for name in registry.refs() if layout.takes_only_signed(name) and (not refs or name in refs)):
            _check_signature(registry, manifests, ref, found)
    found.problems.sort(key=lambda problem: problem.key)
    return found


def _starts(registry: Registry, refs: Sequence[str], found: Audit) -> dict[str, set[str]]:
    """Digest -> who needs it."""
    wanted: dict[str, set[str]] = {}
    if not refs:
        for key in registry.store.list(layout.MANIFESTS):
            wanted[layout.manifest_digest(key)] = set()
    for name in refs or registry.refs():
        if layout.is_digest(name):
            wanted.setdefault(name, set())
            continue
        try:
            wanted.setdefault(registry.ref(name).digest, set()).add(name)
            registry.history(name)
        except (ArtifactCorrupt, ArtifactNotFound) as error:
            if refs and isinstance(error, ArtifactNotFound):
                raise
            found.problems.append(Problem(layout.ref_key(name), str(error)))
    return wanted


def _follow(registry: Registry, wanted: dict[str, set[str]], found: Audit) -> dict[str, Manifest]:
    """The wanted manifests and all their parents, whole ones only."""
    manifests: dict[str, Manifest] = {}
    waiting = list(wanted)
    while waiting:
        digest = waiting.pop()
        try:
            manifest = manifests[digest] = registry.manifest(digest)
        except (ArtifactCorrupt, ArtifactNotFound) as error:
            found.problems.append(Problem(layout.manifest_key(digest), str(error), tuple(sorted(wanted[digest]))))
            continue
        for role, parent in manifest.parents.items():
            if parent not in wanted:
                waiting.append(parent)
            wanted.setdefault(parent, set()).add(f"{role} of {manifest.kind} {digest[:16]}")
    return manifests


def _hash_files(
    registry: Registry, manifests: Mapping[str, Manifest], workers: int, found: Audit, on_progress: OnProgress
) -> None:
    """Each blob once, however many artifacts share it."""
    users: dict[tuple[str, int], list[str]] = {}
    for digest, manifest in manifests.items():
        for name, blob in manifest.files.items():
            users.setdefault((blob.digest, blob.size), []).append(f"{manifest.kind} {digest[:16]}: {name}")
    found.files, found.size = len(users), sum(size for _, size in users)
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_wrong, registry, *blob): blob for blob in users}
        for each in as_completed(waiting):
            digest, size = waiting[each]
            what = each.result()
            if what is not None:
                found.problems.append(Problem(blob_key(digest), what, tuple(sorted(users[digest, size]))))
            done += size
            on_progress(done, found.size)


def _wrong(registry: Registry, digest: str, size: int) -> str | None:
    try:
        stored = registry.store.measure(digest)
    except ArtifactNotFound:
        return "missing"
    if stored.digest != digest or stored.size != size:
        return f"corrupt: {stored.size} bytes of sha256 {stored.digest}, not {size}"
    return None


def _check_signature(registry: Registry, manifests: Mapping[str, Manifest], ref: str, found: Audit) -> None:
    digest = registry.ref(ref).digest
    if registry.trust is None or digest not in manifests:
        return
    try:
        signatures.verify(registry.store, manifests[digest], registry.trust, ref)
        found.signatures += 1
    except SignatureRefused as error:
        found.problems.append(Problem(f"{layout.SIGNATURES}{digest}/", str(error), (ref,)))
