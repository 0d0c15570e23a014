"""How a publication and a sweep keep out of each other's way: each says what it is about before it looks.

A publication writes down what it will name, then looks whether a sweep is deleting that. A sweep writes down what it
will delete, then looks what is claimed. On a store whose reads see every earlier write one of the two sees the other:
the sweep spares what is claimed, the publication waits for what is being deleted and then stores it anew.

It owns these records and this order; it does not know what is reachable.
"""

import time
from collections.abc import Collection, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from pydantic import AwareDatetime

from infra.registry import layout
from infra.registry.records import Record, parse
from infra.store.artifacts import AlreadyExists, ArtifactNotFound, ArtifactStore, Conflict

CLAIM_HOLDS = timedelta(days=7)
"""A publication that takes longer was killed; what it claimed is anybody's again."""
_POLL_SECONDS = 0.2


class Claim(Record):
    """What a publication under way is about to name: keys of blobs, and manifests as parents."""

    keys: tuple[str, ...]
    since: AwareDatetime


class Sweep(Record):
    """A sweep under way: what it may delete, and until when. One at a time."""

    keys: tuple[str, ...]
    who: str
    since: AwareDatetime
    stops: AwareDatetime
    """It deletes nothing from then on."""
    expires: AwareDatetime
    """From then on it counts as dead; the time in between is for clocks that disagree and requests under way."""


@contextmanager
def claimed(store: ArtifactStore, keys: Collection[str]) -> Generator[None]:
    """Hold `keys` against every sweep; on entry none of them is being deleted, on exit something names them."""
    place = f"{layout.CLAIMS}{uuid4().hex}.json"
    store.create(place, Claim(keys=tuple(sorted(keys)), since=datetime.now(UTC)).canonical())
    try:
        await_sweep(store, keys)
        yield
    finally:
        store.delete(place)


def await_sweep(store: ArtifactStore, keys: Collection[str]) -> None:
    """Return once no sweep is deleting any of `keys`."""
    wanted = set(keys)
    while True:
        try:
            sweep = parse(Sweep, store.read(layout.SWEEP), layout.SWEEP)
        except ArtifactNotFound:
            return
        if wanted.isdisjoint(sweep.keys) or datetime.now(UTC) >= sweep.expires:
            return
        time.sleep(_POLL_SECONDS)


def live_claims(store: ArtifactStore) -> set[str]:
    """Every key that a publication under way is about to name; claims of the killed are cleared up."""
    held: set[str] = set()
    for place in store.list(layout.CLAIMS):
        try:
            claim = parse(Claim, store.read(place), place)
        except ArtifactNotFound:  # it is done, and what it published is there to be seen
            continue
        if datetime.now(UTC) - claim.since > CLAIM_HOLDS:
            store.delete(place)
        else:
            held |= set(claim.keys)
    return held


@contextmanager
def sweeping(store: ArtifactStore, keys: Collection[str], *, who: str, lasts: timedelta) -> Generator[Sweep]:
    """Be the one sweep there is, for `lasts` at most; what to delete is then decided with all claims in view."""
    now = datetime.now(UTC)
    sweep = Sweep(keys=tuple(sorted(keys)), who=who, since=now, stops=now + lasts, expires=now + 2 * lasts)
    try:
        standing = store.read(layout.SWEEP)
    except ArtifactNotFound:
        standing = None
    other = None if standing is None else parse(Sweep, standing, layout.SWEEP)
    if other and now < other.expires:
        raise Conflict(f"{other.who} has been sweeping since {other.since}; try again after {other.expires}")
    try:
        if standing is None:
            store.create(layout.SWEEP, sweep.canonical())
        else:
            store.swap(layout.SWEEP, sweep.canonical(), standing.version)
    except (AlreadyExists, Conflict):
        raise Conflict("somebody else has begun to sweep this moment; try again later") from None
    yield sweep
    # Not after an error, when a request to delete may still be under way, and not once the place may be another's.
    if datetime.now(UTC) < sweep.expires:
        store.delete(layout.SWEEP)
