"""A registry as a process opens it: the store at a URL, and what the environment says of trust and of the webhook.

It owns the names of those variables: STIV_TRUST, a policy file; STIV_WEBHOOK_URL and STIV_WEBHOOK_SECRET, who is told
of moved refs.
"""

from collections.abc import Mapping
from pathlib import Path

from infra import webhook
from infra.registry.outbox import Outbox
from infra.registry.registry import Registry
from infra.registry.signing.trust import Trust
from infra.store.location import open_store


def open_registry(url: str, environment: Mapping[str, str], *, trust: Path | None = None) -> Registry:
    """The registry in the store at `url`; `trust`, a policy file, stands above the environment's."""
    named = trust or environment.get("STIV_TRUST")
    registry = Registry(open_store(url), trust=Trust.load(Path(named)) if named else None)
    if environment.get("STIV_WEBHOOK_URL"):
        registry.listener = open_outbox(registry, environment)
    return registry


def open_outbox(registry: Registry, environment: Mapping[str, str]) -> Outbox:
    """The outbox of the environment's webhook."""
    url, secret = environment.get("STIV_WEBHOOK_URL"), environment.get("STIV_WEBHOOK_SECRET")
    if not url or not secret:
        raise ValueError("set STIV_WEBHOOK_URL and STIV_WEBHOOK_SECRET to the receiver's address and the shared secret")
    return Outbox(registry, url, webhook.read_secret(secret))
