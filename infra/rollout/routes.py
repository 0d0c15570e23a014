"""Where requests go: the addresses of both tracks and the canary's share of new videos, in one small file.

It owns the file, which is replaced whole and read by the router whenever it changes; it knows nothing of HTTP. It is to
this machine what an HTTPRoute with weights is to a cluster.
"""

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from model.config import Config

Percent = Annotated[int, Field(ge=0, le=100)]
ROUTES = "routes.json"


class Routes(Config):
    stable: str
    """Such as http://127.0.0.1:8001."""
    canary: str | None = None
    canary_weight: Percent = 0
    """Percent of new videos."""

    @model_validator(mode="after")
    def _only_a_canary_has_weight(self) -> Self:
        if self.canary is None and self.canary_weight:
            raise ValueError(f"canary_weight {self.canary_weight} without a canary; name its address, or give it 0")
        return self

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(self.model_dump_json(indent=2) + "\n")
        os.replace(draft, path)


def read_routes(path: Path) -> Routes:
    try:
        return Routes.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: nothing is served from here; `stiv rollout up` starts a home") from None
    except ValidationError as error:
        raise ValueError(f"{path} is no file of routes: {error}") from None
