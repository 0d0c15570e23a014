"""Files of jobs in the artifact store: kept as long as one job needs them, then deleted for good.

It owns who needs which blob; it knows nothing of what is in one. Blobs are named by their content, so two jobs may need
the same: each use is a row, and a blob is deleted under the lock that a new use of it has to take.
"""

import tempfile
import time
import uuid
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import delete, or_, select

from infra.serving.jobs.database import Database
from infra.serving.jobs.table import FileUse
from infra.store.artifacts import ArtifactStore, blob_key, blob_of

KEPT_S = 24 * 3600.0
"""How long a file is kept for a job that is still to be made, or to be completed, with it."""


class JobFiles:
    def __init__(self, database: Database, store: ArtifactStore) -> None:
        self.database = database
        self.store = store

    def keep(self, path: Path) -> str:
        """Digest of the file in the store, where it stays until the job is made or completed that names it."""
        blob = blob_of(path)
        with self.database.write() as session:
            self.database.lock(session, blob.digest)  # not while it is being deleted
            holder = f"keeping/{uuid.uuid4().hex}"
            session.add(FileUse(digest=blob.digest, holder=holder, expires_at=time.time() + KEPT_S))
        return self.store.put_file(path, known=blob).digest

    def keep_bytes(self, data: bytes) -> str:
        with tempfile.TemporaryDirectory(prefix="stiv-file-") as name:
            path = Path(name) / "file"
            path.write_bytes(data)
            return self.keep(path)

    def open(self, digest: str) -> BinaryIO:
        """The verified bytes as an open file that has no name any more, so that nothing is left behind."""
        with tempfile.TemporaryDirectory(prefix="stiv-file-") as name:
            path = Path(name) / "file"
            self.store.fetch_file(digest, path)
            return path.open("rb")

    def read(self, digest: str) -> bytes:
        with self.open(digest) as file:
            return file.read()

    def delete_expired(self, limit: int = 100) -> int:
        """Delete blobs that nobody needs any more; how many."""
        overdue = select(FileUse.digest).where(FileUse.expires_at <= time.time()).distinct().limit(limit)
        with self.database.read() as session:
            digests = list(session.scalars(overdue))
        return sum(self._delete_if_unused(digest) for digest in digests)

    def _delete_if_unused(self, digest: str) -> bool:
        now = time.time()
        with self.database.write() as session:
            self.database.lock(session, digest)
            session.execute(delete(FileUse).where(FileUse.digest == digest, FileUse.expires_at <= now))
            still = or_(FileUse.expires_at.is_(None), FileUse.expires_at > now)
            if session.scalar(select(FileUse.holder).where(FileUse.digest == digest, still).limit(1)) is not None:
                return False
            self.store.delete(blob_key(digest))
        return True
