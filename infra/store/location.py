"""Which store a URL means.

It owns the forms of URL; it knows nothing of how a store works.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from infra.store.artifacts import ArtifactStore
from infra.store.folder import FolderStore
from infra.store.s3 import S3Store
from infra.store.s3_client import S3Access


def open_store(url: str, access: S3Access | None = None) -> ArtifactStore:
    """The store at `file:///folder`, at a plain folder path, or at `s3://bucket/prefix`."""
    if url.startswith("s3://"):
        parts = urlsplit(url)
        return S3Store(parts.netloc, parts.path.strip("/"), access)
    if url.startswith("file:///"):
        return FolderStore(Path(unquote(url.removeprefix("file://"))))
    if not url or "://" in url:
        raise ValueError(f"{url!r} is not a store: use a folder path, file:///folder or s3://bucket/prefix")
    return FolderStore(Path(url))
