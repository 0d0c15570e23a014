"""One release at a time: a lease in the registry's store that a second release waits for, or is refused by.

It owns that one object; it knows nothing of canaries. It is taken by compare-and-swap, so of two that come at once one
has it; it runs out if its holder is not heard of, and the same holder may take it again, as a resumed run does.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager

from infra.store.artifacts import AlreadyExists, ArtifactNotFound, ArtifactStore, Conflict
from model.config import Config

KEY = "rollout/lease.json"
TERM_S = 600.0
"""How long a holder that is not heard of has it still."""
POLL_S = 0.2


class ReleaseInProgress(ValueError):
    """Another release is under way; nothing was changed."""


class Held(Config):
    """What the object says; a holder of "" is nobody."""

    holder: str
    since: float
    until: float


class Lease:
    """Held while the `with` block of `releasing` runs."""

    def __init__(self, store: ArtifactStore, holder: str) -> None:
        self.store = store
        self.holder = holder

    def take(self) -> bool:
        """Whether it is ours now, for another term."""
        now = time.time()
        try:
            standing = self.store.read(KEY)
        except ArtifactNotFound:
            try:
                self.store.create(KEY, _bytes(Held(holder=self.holder, since=now, until=now + TERM_S)))
            except AlreadyExists:
                return False
            return True
        held = Held.model_validate_json(standing.data)
        ours = held.holder == self.holder
        if not ours and held.holder and held.until > now:
            return False
        since = held.since if ours else now
        try:
            self.store.swap(KEY, _bytes(Held(holder=self.holder, since=since, until=now + TERM_S)), standing.version)
        except Conflict:
            return False
        return True

    def give_back(self) -> None:
        """To nobody; what is no longer ours is left alone."""
        standing = self.store.read(KEY)
        if Held.model_validate_json(standing.data).holder == self.holder:
            self.store.swap(KEY, _bytes(Held(holder="", since=time.time(), until=0.0)), standing.version)

    def refusal(self) -> ReleaseInProgress:
        held = Held.model_validate_json(self.store.read(KEY).data)
        minutes, left_s = (time.time() - held.since) / 60, max(0.0, held.until - time.time())
        return ReleaseInProgress(
            f"release '{held.holder}' is under way since {minutes:.0f} min: let this one wait for it, or end it with"
            f" `stiv rollout abort`; if it died, it loses its place in {left_s:.0f} s"
        )


@contextmanager
def releasing(store: ArtifactStore, holder: str, *, wait_s: float = 0.0) -> Generator[Lease, None, None]:
    """The right to release, for `holder`; `take` it again at times, or it runs out.

    Raises:
        ReleaseInProgress: somebody else has it, and had it still after `wait_s`.
    """
    lease, deadline = Lease(store, holder), time.monotonic() + wait_s
    while not lease.take():
        if time.monotonic() >= deadline:
            raise lease.refusal()
        time.sleep(POLL_S)
    try:
        yield lease
    finally:
        lease.give_back()


def _bytes(held: Held) -> bytes:
    return held.model_dump_json().encode()
