"""The job database: SQLite by default, PostgreSQL when given; committed means durable in both.

It owns connections, durability settings and the version of the schema; it knows nothing of what the rows mean.
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, inspect, make_url, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from infra.serving.jobs.table import Base, Job, Schema

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the tables in `table`. Whoever changes them raises it and adds the way there to MIGRATIONS."""
MIGRATIONS: Sequence[Callable[[Connection], None]] = ()
"""The first leads from version 1 to 2, and so on; each runs in the transaction that also writes the new version."""
LOCK_WAIT_S = 10
_SCHEMA_LOCK = "stiv/schema"


class SchemaMismatch(Exception):
    """The database holds other tables than this version of the server works with."""


class Database:
    """Sessions on one database. Everything committed is on disk: SQLite synchronous=FULL, synchronous_commit=on."""

    def __init__(self, url: str, *, migrating: bool = False) -> None:
        """Makes the tables where there are none, safely if several replicas do; other tables are refused.

        Raises:
            SchemaMismatch: the tables are of another version; `migrating` brings older ones up to this one.
        """
        self.engine = _open(url)
        self._reading = sessionmaker(self.engine, expire_on_commit=False)
        self._writing = sessionmaker(self.engine.execution_options(begin="IMMEDIATE"), expire_on_commit=False)
        try:
            with self.write() as session:
                self.lock(session, _SCHEMA_LOCK)
                _settle_schema(session, migrating=migrating)
        except BaseException:
            self.close()
            raise

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Generator[Session, None, None]:
        with self._reading.begin() as session:
            yield session

    @contextmanager
    def write(self) -> Generator[Session, None, None]:
        """Committed at the end, undone by an exception."""
        with self._writing.begin() as session:
            yield session

    def lock(self, session: Session, name: str) -> None:
        """Until the transaction ends, nobody else has the lock of that name; SQLite lets one writer in anyway."""
        if not self.is_sqlite:
            session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))

    def is_reachable(self) -> bool:
        try:
            with self.read() as session:
                session.scalar(select(Job.sequence).limit(1))
        except SQLAlchemyError:
            return False
        return True

    def close(self) -> None:
        self.engine.dispose()


def _open(url: str) -> Engine:
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ValueError("a job database in memory loses every job; give it a file, like sqlite:///runs/jobs.db")
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed)
        _use_write_ahead_log(engine)
        return engine
    if backend == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,  # a restarted server is noticed before a query is lost to it
            connect_args={"connect_timeout": 5, "options": _postgres_options()},
        )
        _warn_of_lost_writes(engine)
        return engine
    raise ValueError(f"database '{backend}' is not served from; use sqlite:///FILE or postgresql://USER@HOST/NAME")


def _postgres_options() -> str:
    """A wait for a lock ends in an error that is tried again; a replica that hangs in a transaction is cut off."""
    wait_ms = LOCK_WAIT_S * 1000
    settings = {
        "synchronous_commit": "on",
        "lock_timeout": wait_ms,
        "idle_in_transaction_session_timeout": 6 * wait_ms,
    }
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


def _warn_of_lost_writes(engine: Engine) -> None:
    with engine.connect() as connection:
        if connection.scalar(text("show fsync")) != "on":
            logger.warning("PostgreSQL runs with fsync off: a power cut can lose jobs that were acknowledged")


def _use_write_ahead_log(engine: Engine) -> None:
    """Readers never wait; a writer takes the lock when its transaction begins, so none fails half way."""

    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        connection.execute(f"PRAGMA busy_timeout={LOCK_WAIT_S * 1000}")
        _enter_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    def begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)


def _enter_wal(connection: Any) -> None:
    """The switch of a new file does not wait for another process that makes it too, so it is tried again."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _settle_schema(session: Session, *, migrating: bool) -> None:
    connection = session.connection()
    tables = set(inspect(connection).get_table_names())
    if not tables & set(Base.metadata.tables):
        Base.metadata.create_all(connection)
        session.add(Schema(version=VERSION))
        return
    found = session.scalar(select(func.max(Schema.version))) if Schema.__tablename__ in tables else None
    if found == VERSION:
        return
    if found is None or found > VERSION:
        raise SchemaMismatch(
            f"the job database holds tables of version {found or 'none'}, this server works with {VERSION}: serve it"
            " with the release that wrote it, or give another database"
        )
    if not migrating:
        raise SchemaMismatch(
            f"the job database holds tables of version {found}, this server works with {VERSION}: stop all servers on"
            " it, make a copy of it, run `stiv migrate-jobs`, and start them again"
        )
    for migrate in MIGRATIONS[found - 1 :]:
        migrate(connection)
    session.merge(Schema(version=VERSION))
