"""Logging as JSON lines on stderr, with the fields that say which run or job a line belongs to.

It owns the format and the filter that keeps ranks other than 0 quiet; it does not know what is worth logging.
A number worth graphing is a metric (`monitoring.metrics`), not a log line.
"""

import json
import logging
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

Field = str | int | float | bool | None

_bound: ContextVar[Mapping[str, Field] | None] = ContextVar("stiv_log_fields", default=None)
_OWN_KEYS = frozenset({"timestamp", "level", "logger", "message", "exception"})
# What logging itself puts on a record; all else came by `extra=`.
_RECORD_KEYS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def configure(level: int | str = logging.INFO, **fields: Field) -> None:
    """Send this process's logs to stderr as JSON; call once at its entry point.

    `fields` (run_id, stage, rank, …) stand in every line. With a `rank` other than 0 only warnings and worse pass.
    """
    _refuse_own_keys(fields)
    root = logging.getLogger()
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if isinstance(handler, _JsonHandler)]:
        root.removeHandler(handler)
    root.addHandler(_JsonHandler(fields))


@contextmanager
def bound(**fields: Field) -> Generator[None, None, None]:
    """Add fields (step, job_id) to the lines of this thread or task for as long as the block runs."""
    _refuse_own_keys(fields)
    token = _bound.set({**(_bound.get() or {}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class _JsonHandler(logging.StreamHandler[TextIO]):
    """The one handler `configure` owns, so that a second call replaces it and no other."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_JsonFormatter(fields))
        if fields.get("rank", 0) != 0:
            self.addFilter(_is_warning)


class _JsonFormatter(logging.Formatter):
    def __init__(self, fields: Mapping[str, Field]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **(_bound.get() or {}),
            **{key: value for key, value in vars(record).items() if key not in _RECORD_KEYS | _OWN_KEYS},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _refuse_own_keys(fields: Mapping[str, Field]) -> None:
    taken = sorted(_OWN_KEYS & fields.keys())
    if taken:
        raise ValueError(f"log fields {taken} are written by every line itself; choose other names")
