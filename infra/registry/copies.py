"""Copies of artifacts in folders of this machine: they appear whole, and are looked at again before they are used.

It owns what a complete copy is; it does not know where files come from.
"""

import errno
import os
from pathlib import Path

from infra.registry.records import Manifest
from infra.store.artifacts import ArtifactCorrupt, blob_of


def put_in_place(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        # Another process that fetched the same was quicker; what it put there is looked at next.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def occupied(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def verify_names(manifest: Manifest, folder: Path) -> None:
    missing = [name for name in sorted(manifest.files) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is in use and is no copy of {manifest.kind} {manifest.digest}: it lacks {missing};"
            " fetch to another folder"
        )


def verify(manifest: Manifest, folder: Path) -> None:
    verify_names(manifest, folder)
    for name, blob in sorted(manifest.files.items()):
        found = blob_of(folder / name)
        if found != blob:
            raise ArtifactCorrupt(
                f"{folder / name} is not the file of {manifest.kind} {manifest.digest}: expected sha256 {blob.digest},"
                f" found {found.digest}; delete the folder and fetch it again"
            )
