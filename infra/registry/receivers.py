"""Who can be told of moved refs, and in which form: a signed webhook, or the event source of Argo Events.

It owns what an event says; it does not know what was told already or when to try again.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue

from infra import webhook
from infra.registry.records import Manifest, Ref


class Receiver(Protocol):
    """Takes one event at a time; who it is is its address."""

    @property
    def url(self) -> str: ...

    def send(self, message_id: str, move: Ref, data: Mapping[str, JsonValue]) -> None:
        """Once; `WebhookFailed` if it was not taken. The id is the same at every attempt."""


@dataclass(frozen=True, slots=True)
class SignedWebhook:
    """A receiver of Standard Webhooks."""

    url: str
    secret: bytes = field(repr=False)

    def send(self, message_id: str, move: Ref, data: Mapping[str, JsonValue]) -> None:
        body = {"type": kind(move), "timestamp": move.when.isoformat(), "data": data}
        encoded = json.dumps(body, sort_keys=True).encode()
        webhook.post(self.url, self.secret, message_id, encoded)


@dataclass(frozen=True, slots=True)
class ArgoEvents:
    """A webhook event source of Argo Events, in the form that a flow with Metaflow's `@trigger` waits for.

    `headers` are what the source asks for to let somebody in. Metaflow reads `body.payload`: the name it waits for,
    an id, a time in whole seconds, and one field for each parameter of a flow.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def send(self, message_id: str, move: Ref, data: Mapping[str, JsonValue]) -> None:
        name = event_name(move)
        payload = {name: value for name, value in data.items() if value is not None} | {
            "name": name,
            "id": message_id,
            "timestamp": int(move.when.timestamp()),
            "utc_date": move.when.strftime("%Y%m%d"),
            "type": kind(move),
        }
        body = json.dumps({"name": name, "payload": payload}, sort_keys=True).encode()
        webhook.deliver(self.url, body, {"content-type": "application/json", **self.headers})


def event_name(move: Ref) -> str:
    """`stiv.t2i.promoted` of a promotion to `t2i/promoted`: a flow can wait for one ref.

    A rollback has `.rolled_back` behind it, so that it starts no next stage.
    """
    name = "stiv." + re.sub(r"[^A-Za-z0-9_.-]", "_", move.name.replace("/", "."))
    return name if move.restores is None else f"{name}.rolled_back"


def kind(move: Ref) -> str:
    return "stiv.promoted" if move.restores is None else "stiv.rolled_back"


def facts(move: Ref, manifest: Manifest, store: str) -> dict[str, JsonValue]:
    """What a next stage needs to know of a move."""
    return {
        "ref": move.name,
        "generation": move.generation,
        "digest": move.digest,
        "kind": manifest.kind,
        "stage": (manifest.recipe or {}).get("name"),
        "previous": move.previous,
        "restores": move.restores,
        "who": move.who,
        "why": move.why,
        "override": move.override,
        "store": store,
    }
