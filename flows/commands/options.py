"""Options that several commands share, and the registry they name; it does not know what a command does."""

import os
from pathlib import Path
from typing import Annotated

import typer

from infra.registry import opening
from infra.registry.registry import Registry

StoreOption = Annotated[str, typer.Option(help="artifact store: a folder or s3://bucket/prefix")]
WorkOption = Annotated[Path, typer.Option(help="folder for this machine's copies and results")]
JsonOption = Annotated[bool, typer.Option("--json", help="as JSON")]
TrustOption = Annotated[Path | None, typer.Option(help="policy of trusted keys; STIV_TRUST unless said")]


def open_registry(store: str, trust: Path | None = None) -> Registry:
    return opening.open_registry(store, os.environ, trust=trust)
