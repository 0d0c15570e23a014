"""A registry as a process opens it: the store at a URL, and what the environment says of trust and of receivers.

It owns the names of those variables: STIV_TRUST, a policy file; STIV_WEBHOOK_URL and STIV_WEBHOOK_SECRET, a signed
webhook; and those by which Metaflow tells its pods of Argo Events. Every receiver that is named hears of moved refs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra import webhook
from infra.registry.outbox import Outbox
from infra.registry.receivers import ArgoEvents, Receiver, SignedWebhook
from infra.registry.registry import Registry
from infra.registry.signing.trust import Trust
from infra.store.location import open_store

WEBHOOK, WEBHOOK_SECRET = "STIV_WEBHOOK_URL", "STIV_WEBHOOK_SECRET"
ARGO, ARGO_AUTH = "METAFLOW_ARGO_EVENTS_WEBHOOK_URL", "METAFLOW_ARGO_EVENTS_WEBHOOK_AUTH"
ARGO_TOKEN = "STIV_ARGO_EVENTS_TOKEN"
"""What the event source's `authSecret` holds, if it has one."""


def open_registry(url: str, environment: Mapping[str, str], *, trust: Path | None = None) -> Registry:
    """The registry in the store at `url`; `trust`, a policy file, stands above the environment's."""
    named = trust or environment.get("STIV_TRUST")
    registry = Registry(open_store(url), trust=Trust.load(Path(named)) if named else None)
    registry.listeners = outboxes(registry, environment)
    return registry


def outboxes(registry: Registry, environment: Mapping[str, str]) -> tuple[Outbox, ...]:
    """An outbox for each receiver that the environment names."""
    return tuple(Outbox(registry, receiver) for receiver in receivers(environment))


def receivers(environment: Mapping[str, str]) -> list[Receiver]:
    """Who is to be told, by what the environment says."""
    found: list[Receiver] = []
    if environment.get(WEBHOOK) or environment.get(WEBHOOK_SECRET):
        secret = environment.get(WEBHOOK_SECRET)
        if not environment.get(WEBHOOK) or not secret:
            raise ValueError(f"set {WEBHOOK} and {WEBHOOK_SECRET} to the receiver's address and the shared secret")
        found.append(SignedWebhook(_address(environment, WEBHOOK), webhook.read_secret(secret)))
    if environment.get(ARGO):
        found.append(ArgoEvents(_address(environment, ARGO), _argo_headers(environment)))
    return found


def _argo_headers(environment: Mapping[str, str]) -> dict[str, str]:
    """What lets us in, as Metaflow's own events are: the service's headers where it says so, and a token."""
    headers: dict[str, str] = {}
    if environment.get(ARGO_AUTH) == "service":
        try:
            told: Any = json.loads(environment.get("METAFLOW_SERVICE_HEADERS") or "{}")
            headers |= {str(name): str(value) for name, value in told.items()}
        except (ValueError, AttributeError):
            raise ValueError("METAFLOW_SERVICE_HEADERS is not a JSON object of headers") from None
        if key := environment.get("METAFLOW_SERVICE_AUTH_KEY"):
            headers["x-api-key"] = key
    if token := environment.get(ARGO_TOKEN):
        headers["authorization"] = f"Bearer {token}"
    return headers


def _address(environment: Mapping[str, str], name: str) -> str:
    if not environment[name].startswith(("http://", "https://")):
        raise ValueError(f"{name} is no http:// or https:// URL")
    return environment[name]
