"""Options that several commands share, and the registry they name; it does not know what a command does."""

from pathlib import Path
from typing import Annotated

import typer

from infra.registry.registry import Registry
from infra.store.location import open_store

StoreOption = Annotated[str, typer.Option(help="artifact store: a folder or s3://bucket/prefix")]
WorkOption = Annotated[Path, typer.Option(help="folder for this machine's copies and results")]
JsonOption = Annotated[bool, typer.Option("--json", help="as JSON")]


def open_registry(store: str) -> Registry:
    return Registry(open_store(store))
