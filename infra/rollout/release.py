"""A signed engine goes to `release/candidate`, stands beside stable as a canary, and becomes `release/stable` or not.

It owns the order and which refs move when; it knows nothing of processes, pods or statistics. Every step may be done
again: a release that was interrupted goes on with the canary that stands.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.engines.export import read_parity
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.registry.signing import signatures
from infra.rollout.canary import Canary, CanaryPlan, Fleet, Observation, OnLook, Outcome
from infra.rollout.lease import Lease, releasing
from infra.rollout.prometheus import Prometheus
from infra.store.artifacts import ArtifactNotFound
from model.config import Config
from monitoring import metrics

logger = logging.getLogger(__name__)

STABLE = "release/stable"
CANDIDATE = "release/candidate"

Decision = Literal["promote", "abort"]


class Release(Config):
    """How a release ended."""

    engine: str
    """Digest."""
    before: str | None
    """The engine that was stable; None of a first release."""
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Terms:
    """Who releases, and how."""

    who: str
    holder: str
    """Names the release to others; a resumed one has the name that it had."""
    plan: CanaryPlan
    wait_s: float = 0.0
    """For another release to end."""


def require_releasable(registry: Registry, digest: str) -> Manifest:
    """An engine that was proven; what is signed is asked when a ref is moved."""
    manifest = registry.manifest(digest)
    if manifest.kind != "engine":
        raise ValueError(f"{digest[:16]} is of kind '{manifest.kind}'; only an engine can be released")
    report = read_parity(registry, manifest)
    if report is None:
        raise ValueError(
            f"engine {digest[:16]} has no parity report: nothing shows that it computes what its checkpoint does;"
            " `stiv engine verify` proves it on a machine that runs it"
        )
    report.require_passed()
    return manifest


def sign_candidate(registry: Registry, digest: str, key: Path, password: bytes | None, *, who: str) -> Manifest:
    """Sign a proven engine and point `release/candidate` at it.

    Raises:
        SignatureRefused: the registry does not trust that key. ParityFailed, ValueError: it is not proven.
    """
    manifest = require_releasable(registry, digest)
    signatures.sign(registry.store, manifest, key, password)
    registry.promote(CANDIDATE, digest, who=who, why="proven and signed")
    return manifest


def stable_engine(registry: Registry) -> Manifest | None:
    """What is released now."""
    try:
        return registry.resolve(STABLE)
    except ArtifactNotFound:
        return None


def release(
    registry: Registry,
    digest: str,
    fleet: Fleet,
    prometheus: Prometheus,
    terms: Terms,
    on_look: OnLook | None = None,
) -> Release:
    """Lead a signed engine through its canary, and move `release/stable` if it passes.

    Raises:
        ReleaseInProgress: another one is under way. SignatureRefused: it is not signed. PrometheusUnreachable.
        ValueError: it is not proven, or there is no stable engine to stand beside.
    """
    with releasing(registry.store, terms.holder, wait_s=terms.wait_s) as lease:
        manifest = require_releasable(registry, digest)
        registry.promote(CANDIDATE, digest, who=terms.who, why=f"release {terms.holder}")
        before = stable_engine(registry)
        if before is None:
            raise ValueError(
                f"there is no {STABLE} for a canary to stand beside; ReleaseFlow makes a first one live at once"
            )
        if before.digest == digest and fleet.stable_engine == digest:
            outcome = Outcome(decision="promote", reason="it is stable already", seconds=0.0, observations=())
            return Release(engine=digest, before=digest, outcome=outcome)
        canary = Canary(fleet, prometheus, terms.plan, _renewing(lease, on_look))
        outcome = canary.run(digest, same_weights=before.parents == manifest.parents)
        if outcome.decision == "promote":
            outcome = _go_live(registry, digest, fleet, terms, outcome)
        metrics.RELEASES_TOTAL.labels(outcome.decision).inc()
        return Release(engine=digest, before=before.digest, outcome=outcome)


def first_release(registry: Registry, digest: str, *, who: str) -> Manifest:
    """Point `release/stable` at a signed engine that has none to stand beside."""
    manifest = require_releasable(registry, digest)
    if stable_engine(registry) is not None:
        raise ValueError(f"there is a {STABLE} already; release the engine beside it, or `stiv rollback {STABLE}`")
    registry.promote(CANDIDATE, digest, who=who, why="the first release")
    registry.promote(STABLE, digest, who=who, why="the first release")
    return manifest


def _go_live(registry: Registry, digest: str, fleet: Fleet, terms: Terms, outcome: Outcome) -> Outcome:
    """The ref says what shall be served, then the fleet does; if that fails the ref goes back as well."""
    registry.promote(STABLE, digest, who=terms.who, why=f"release {terms.holder}: {outcome.reason}")
    if fleet.stable_engine == digest and fleet.canary_engine is None:
        return outcome
    try:
        fleet.promote()
    except RuntimeError as error:
        logger.exception("the new stable servers did not come up, the old ones go on")
        registry.rollback(STABLE, who=terms.who, why=f"release {terms.holder}: {error}"[:500])
        fleet.abort()
        return outcome.model_copy(update={"decision": "abort", "reason": f"the new stable did not come up: {error}"})
    return outcome


def _renewing(lease: Lease, on_look: OnLook | None) -> OnLook:
    """Each look keeps the lease alive."""

    def look(seen: Observation) -> None:
        if not lease.take():
            raise lease.refusal()
        if on_look is not None:
            on_look(seen)

    return look
