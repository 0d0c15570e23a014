"""Events of moved refs over a real HTTP server: told at least once, whoever dies in between."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.registry.opening import open_registry
from infra.registry.outbox import ATTEMPTS, Outbox, message_id
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.store.folder import FolderStore
from model.config import GateRule
from tests.webhook_receiver import Receiver, receiving

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
RULES = (GateRule(metric="loads", op=">=", bound=1),)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(SECRET) as running:
        yield running


@pytest.fixture
def registry(tmp_path: Path, receiver: Receiver) -> Registry:
    """One that tells, without the pauses between attempts."""
    registry = Registry(FolderStore(tmp_path / "store"))
    registry.listener = outbox(registry, receiver)
    return registry


def outbox(registry: Registry, receiver: Receiver) -> Outbox:
    return Outbox(registry, receiver.url, receiver.secret, sleep=lambda _: None)


def publish(registry: Registry, folder: Path, mark: str = "one") -> Manifest:
    path = folder / mark
    path.write_text(mark)
    recipe = {"name": "t2v"}
    return registry.publish("checkpoint", {"weights": path}, rules=RULES, metrics={"loads": 1}, recipe=recipe)


def told(receiver: Receiver) -> list[dict[str, object]]:
    return [json.loads(body) for _, body in receiver.taken]


def test_a_promotion_and_a_rollback_are_told_with_all_that_a_next_stage_needs(
    registry: Registry, receiver: Receiver, tmp_path: Path
) -> None:
    one, two = publish(registry, tmp_path), publish(registry, tmp_path, "two")
    for each in (one, two):
        registry.promote("t2v/promoted", each.digest, who="ann", why="trained")
    registry.promote("t2v/promoted", two.digest, who="ann", why="the same again")
    registry.rollback("t2v/promoted", who="bob", why="two is worse")
    events = told(receiver)
    assert [event["type"] for event in events] == ["stiv.promoted", "stiv.promoted", "stiv.rolled_back"]
    assert events[1]["data"] == {
        "ref": "t2v/promoted",
        "generation": 2,
        "digest": two.digest,
        "kind": "checkpoint",
        "stage": "t2v",
        "previous": one.digest,
        "restores": None,
        "who": "ann",
        "why": "trained",
        "override": None,
        "store": registry.store.url,
    }


def test_a_receiver_that_fails_for_a_moment_is_asked_again_with_the_same_id(
    registry: Registry, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answers = [500, 302, 503]
    move = registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="trained")
    assert [each for each, _ in receiver.taken] == [message_id(move)]
    assert receiver.refusals == 3


def test_a_receiver_that_is_down_stops_no_promotion_and_is_told_later(
    registry: Registry, receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [500] * ATTEMPTS
    registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="first")
    assert not receiver.taken and "1 events are not delivered yet, `stiv events deliver`" in caplog.text
    assert "hidden" not in caplog.text, "a URL's query can be a secret"
    registry.promote("t2v/promoted", publish(registry, tmp_path, "two").digest, who="ann", why="second")
    assert [event["data"]["why"] for event in told(receiver)] == ["first", "second"]  # pyright: ignore
    assert not outbox(registry, receiver).deliver().told, "what was taken is not sent again"


KILLED = """
import os, signal, sys
from infra.registry.outbox import Outbox
from infra.registry.registry import Registry
from infra.store.folder import FolderStore

class Dying(Outbox):
    def tell(self):
        os.kill(os.getpid(), signal.SIGKILL)

registry = Registry(FolderStore(__import__("pathlib").Path(sys.argv[1])))
registry.listener = Dying(registry, sys.argv[2], b"0" * 24)
registry.promote("t2v/promoted", sys.argv[3], who="ann", why="killed")
"""


def test_the_event_of_a_promoter_that_was_killed_before_it_told_is_sent_by_the_next_one(
    registry: Registry, receiver: Receiver, tmp_path: Path
) -> None:
    one = publish(registry, tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), receiver.url, one.digest]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}).returncode == -signal.SIGKILL
    assert registry.resolve("t2v/promoted") == one and not receiver.taken
    done = outbox(registry, receiver).deliver()
    assert [move.why for move in done.told] == ["killed"] and len(receiver.taken) == 1


def test_what_was_taken_but_not_noted_is_sent_again_under_the_same_id(
    registry: Registry, receiver: Receiver, tmp_path: Path
) -> None:
    registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="first")
    (note,) = [key for key in registry.store.list("events/") if not key.endswith("start.json")]
    registry.store.delete(note)  # as if it had been killed between answer and note
    assert len(outbox(registry, receiver).deliver().told) == 1
    (first, _), (second, _) = receiver.taken
    assert first == second


def test_moves_from_before_the_webhook_was_known_and_moves_never_made_are_not_told(
    tmp_path: Path, receiver: Receiver
) -> None:
    registry = Registry(FolderStore(tmp_path / "store"))
    old = registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="long ago")
    registry.listener = outbox(registry, receiver)
    aborted = old.model_copy(update={"generation": 2, "previous_generation": 1, "why": "aborted"})
    registry.store.create("reflog/t2v/promoted/00000002.json", aborted.canonical())
    registry.promote("t2v/promoted", publish(registry, tmp_path, "two").digest, who="ann", why="now")
    assert [event["data"]["why"] for event in told(receiver)] == ["now"]  # pyright: ignore


def test_a_receiver_with_another_secret_takes_nothing(tmp_path: Path, receiver: Receiver) -> None:
    registry = Registry(FolderStore(tmp_path / "store"))
    registry.listener = Outbox(registry, receiver.url, b"1" * 24, sleep=lambda _: None)
    registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="now")
    assert not receiver.taken and receiver.refusals == ATTEMPTS


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"STIV_WEBHOOK_URL": "http://127.0.0.1:1/"}, "set STIV_WEBHOOK_URL and STIV_WEBHOOK_SECRET"),
        ({"STIV_WEBHOOK_URL": "http://127.0.0.1:1/", "STIV_WEBHOOK_SECRET": "short"}, "24 to 64 bytes"),
        ({"STIV_WEBHOOK_URL": "ftp://x/", "STIV_WEBHOOK_SECRET": SECRET}, "no http:// or https:// URL"),
        ({"STIV_TRUST": "none.toml"}, "none.toml"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said):
        open_registry(str(tmp_path / "store"), environment)
