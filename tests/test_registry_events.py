"""Events of moved refs over a real HTTP server: told at least once, whoever dies in between."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.registry.opening import open_registry, receivers
from infra.registry.outbox import ATTEMPTS, Outbox, message_id
from infra.registry.receivers import SignedWebhook
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.store.folder import FolderStore
from model.config import GateRule
from tests.webhook_receiver import Receiver, receiving, receiving_argo_events

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
    registry.listeners = [outbox(registry, receiver)]
    return registry


def outbox(registry: Registry, receiver: Receiver) -> Outbox:
    return Outbox(registry, SignedWebhook(receiver.url, receiver.secret), sleep=lambda _: None)


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
from infra.registry.receivers import SignedWebhook
from infra.registry.registry import Registry
from infra.store.folder import FolderStore

class Dying(Outbox):
    def tell(self):
        os.kill(os.getpid(), signal.SIGKILL)

registry = Registry(FolderStore(__import__("pathlib").Path(sys.argv[1])))
registry.listeners = [Dying(registry, SignedWebhook(sys.argv[2], b"0" * 24))]
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
    registry.listeners = [outbox(registry, receiver)]
    aborted = old.model_copy(update={"generation": 2, "previous_generation": 1, "why": "aborted"})
    registry.store.create("reflog/t2v/promoted/00000002.json", aborted.canonical())
    registry.promote("t2v/promoted", publish(registry, tmp_path, "two").digest, who="ann", why="now")
    assert [event["data"]["why"] for event in told(receiver)] == ["now"]  # pyright: ignore


def test_a_receiver_with_another_secret_takes_nothing(tmp_path: Path, receiver: Receiver) -> None:
    registry = Registry(FolderStore(tmp_path / "store"))
    registry.listeners = [Outbox(registry, SignedWebhook(receiver.url, b"1" * 24), sleep=lambda _: None)]
    registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="now")
    assert not receiver.taken and receiver.refusals == ATTEMPTS


@pytest.fixture
def argo() -> Iterator[Receiver]:
    with receiving_argo_events("a-token") as running:
        yield running


def telling(folder: Path, environment: dict[str, str]) -> Registry:
    """A registry as that environment has it, without the pauses between attempts."""
    registry = Registry(FolderStore(folder))
    registry.listeners = [Outbox(registry, each, sleep=lambda _: None) for each in receivers(environment)]
    return registry


def on_a_cluster(argo: Receiver, **more: str) -> dict[str, str]:
    """What Metaflow puts into a pod's environment, and the source's token."""
    return {"METAFLOW_ARGO_EVENTS_WEBHOOK_URL": argo.url, "STIV_ARGO_EVENTS_TOKEN": "a-token", **more}


def test_on_a_cluster_argo_events_are_told_in_the_form_that_metaflows_trigger_waits_for(
    argo: Receiver, tmp_path: Path
) -> None:
    registry = open_registry(str(tmp_path / "store"), on_a_cluster(argo))
    one, two = publish(registry, tmp_path), publish(registry, tmp_path, "two")
    move = registry.promote("t2v/promoted", one.digest, who="ann", why="trained")
    registry.promote("t2v/promoted", two.digest, who="ann", why="trained on")
    registry.rollback("t2v/promoted", who="bob", why="two is worse")
    events = told(argo)
    assert [event["name"] for event in events] == ["stiv.t2v.promoted"] * 2 + ["stiv.t2v.promoted.rolled_back"]
    assert events[0]["payload"] == {
        "name": "stiv.t2v.promoted",
        "id": message_id(move),
        "timestamp": int(move.when.timestamp()),
        "utc_date": move.when.strftime("%Y%m%d"),
        "type": "stiv.promoted",
        "ref": "t2v/promoted",
        "generation": 1,
        "digest": one.digest,
        "kind": "checkpoint",
        "stage": "t2v",
        "who": "ann",
        "why": "trained",
        "store": registry.store.url,
    }


def test_an_event_of_argo_is_what_metaflows_own_would_be(argo: Receiver, tmp_path: Path) -> None:
    from metaflow.integrations import ArgoEvent  # pyright: ignore

    registry = open_registry(str(tmp_path / "store"), on_a_cluster(argo))
    registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="trained")
    ArgoEvent("stiv.t2v.promoted", url=argo.url, access_token="a-token").publish(ignore_errors=False)  # pyright: ignore
    ours, theirs = told(argo)
    assert ours.keys() == theirs.keys() and ours["name"] == theirs["name"]
    shared = theirs["payload"].keys() - {"generated-by-metaflow"}  # pyright: ignore
    for name in shared:
        assert type(ours["payload"][name]) is type(theirs["payload"][name])  # pyright: ignore


def test_a_webhook_and_argo_events_are_told_each_and_one_that_is_down_keeps_nothing_from_the_other(
    receiver: Receiver, argo: Receiver, tmp_path: Path
) -> None:
    both = on_a_cluster(argo, STIV_WEBHOOK_URL=receiver.url, STIV_WEBHOOK_SECRET=SECRET)
    argo.answers = [503] * ATTEMPTS
    registry = telling(tmp_path / "store", both)
    registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="trained")
    assert len(receiver.taken) == 1 and not argo.taken
    registry.promote("t2v/promoted", publish(registry, tmp_path, "two").digest, who="ann", why="on")
    assert len(receiver.taken) == 2 and len(argo.taken) == 2
    assert [each for each, _ in receiver.taken] == [each for each, _ in argo.taken]


def test_argo_events_lets_in_who_has_its_token_or_the_headers_of_metaflows_service(
    argo: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = telling(tmp_path / "store", on_a_cluster(argo, STIV_ARGO_EVENTS_TOKEN="another"))
    registry.promote("t2v/promoted", publish(registry, tmp_path).digest, who="ann", why="trained")
    assert not argo.taken and argo.refusals == ATTEMPTS and "answered 401" in caplog.text
    assert "another" not in caplog.text + repr(registry.listeners)
    service = {
        "METAFLOW_ARGO_EVENTS_WEBHOOK_AUTH": "service",
        "METAFLOW_SERVICE_HEADERS": '{"Authorization": "Bearer a-token"}',
        "STIV_ARGO_EVENTS_TOKEN": "",
    }
    registry = telling(tmp_path / "store", on_a_cluster(argo, **service))
    registry.promote("t2v/promoted", publish(registry, tmp_path, "two").digest, who="ann", why="on")
    assert len(argo.taken) == 2


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"METAFLOW_ARGO_EVENTS_WEBHOOK_URL": "argo.example/stiv"}, "METAFLOW_ARGO_EVENTS_WEBHOOK_URL is no http"),
        (
            {
                "METAFLOW_ARGO_EVENTS_WEBHOOK_URL": "http://127.0.0.1:1/",
                "METAFLOW_ARGO_EVENTS_WEBHOOK_AUTH": "service",
                "METAFLOW_SERVICE_HEADERS": "[1]",
            },
            "METAFLOW_SERVICE_HEADERS is not a JSON object",
        ),
        ({"STIV_WEBHOOK_URL": "http://127.0.0.1:1/"}, "set STIV_WEBHOOK_URL and STIV_WEBHOOK_SECRET"),
        ({"STIV_WEBHOOK_URL": "http://127.0.0.1:1/", "STIV_WEBHOOK_SECRET": "short"}, "24 to 64 bytes"),
        ({"STIV_WEBHOOK_URL": "ftp://x/", "STIV_WEBHOOK_SECRET": SECRET}, "no http:// or https:// URL"),
        ({"STIV_TRUST": "none.toml"}, "none.toml"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said):
        open_registry(str(tmp_path / "store"), environment)
