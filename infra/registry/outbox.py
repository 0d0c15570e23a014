"""Events of moved refs, told to a receiver at least once; what is still to be told is read off the log of moves.

So nothing is kept beside the log that could be lost: a promoter that dies between its promotion and the call leaves
the event to the next one, or to `stiv events deliver`. It owns what counts as told and when to try again; what an event
says is `receivers`'.
"""

import hashlib
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import AwareDatetime

from infra.registry.receivers import Receiver, facts
from infra.registry.records import Record, Ref, parse
from infra.registry.registry import Registry
from infra.store.artifacts import AlreadyExists
from infra.webhook import WebhookFailed

logger = logging.getLogger(__name__)

EVENTS = "events/"
START = "start.json"
ATTEMPTS = 4
FIRST_DELAY = 0.5
"""Seconds before the second attempt, doubled for each further one, and up to as much again by chance."""


class Start(Record):
    """Where every ref stood when the receiver was first heard of: what was moved before is not told."""

    generations: dict[str, int]


class Note(Record):
    """That the receiver took an event."""

    when: AwareDatetime


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a run has told and what it leaves for the next."""

    told: tuple[Ref, ...]
    left: tuple[Ref, ...]
    reason: str = ""
    """Why it stopped."""


class Outbox:
    """One receiver and the moves it has not taken yet."""

    def __init__(
        self, registry: Registry, receiver: Receiver, *, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._registry, self._receiver, self._sleep = registry, receiver, sleep
        self._place = f"{EVENTS}{hashlib.sha256(receiver.url.encode()).hexdigest()[:16]}/"

    def expect(self) -> None:
        """A ref is about to be moved: from now on every move is told, and none from before the receiver was known."""
        store = self._registry.store
        if store.exists(self._place + START):
            return
        start = Start(generations={name: self._registry.ref(name).generation for name in self._registry.refs()})
        with suppress(AlreadyExists):  # another process heard of it in this moment too
            store.create(self._place + START, start.canonical())

    def tell(self) -> None:
        """A ref was moved. A receiver that is down is no reason to fail: the move stands, and the event waits."""
        done = self.deliver()
        if done.left:
            logger.warning(
                "%d events are not delivered yet, `stiv events deliver` sends them: %s", len(done.left), done.reason
            )

    def pending(self) -> tuple[Ref, ...]:
        """Moves that took place and were not taken yet, oldest first."""
        self.expect()
        store = self._registry.store
        start = parse(Start, store.read(self._place + START), self._place + START).generations
        told = set(store.list(self._place))
        moves = [
            move
            for name in self._registry.refs()
            for move in self._registry.history(name)
            if move.generation > start.get(name, 0) and self._note(move) not in told
        ]
        return tuple(sorted(moves, key=lambda move: (move.when, move.name, move.generation)))

    def deliver(self) -> Delivery:
        """Tell all that is pending, in order, and stop at the first that is not taken after `ATTEMPTS`."""
        pending = self.pending()
        for index, move in enumerate(pending):
            reason = self._send(move)
            if reason:
                return Delivery(pending[:index], pending[index:], reason)
            with suppress(AlreadyExists):  # another process has told it as well; the receiver knows it by its id
                self._registry.store.create(self._note(move), Note(when=datetime.now(UTC)).canonical())
        return Delivery(pending, ())

    def _send(self, move: Ref) -> str:
        """Why it was not taken; empty if it was."""
        reason = ""
        data = facts(move, self._registry.manifest(move.digest), self._registry.store.url)
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(FIRST_DELAY * 2 ** (attempt - 1) * (1 + random.random()))
            try:
                self._receiver.send(message_id(move), move, data)
                return ""
            except WebhookFailed as error:
                reason = str(error)
                logger.info("event of '%s', attempt %d of %d: %s", move.name, attempt + 1, ATTEMPTS, reason)
        return reason

    def _note(self, move: Ref) -> str:
        return f"{self._place}{move.name}/{move.generation:08d}.json"


def message_id(move: Ref) -> str:
    """The same however often and by whomever the event is sent."""
    return "msg_" + hashlib.sha256(f"{move.name}@{move.generation}:{move.digest}".encode()).hexdigest()[:32]
