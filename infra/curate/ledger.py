"""Ledger: what became of each item of a unit, a line a change, so that a killed run goes on where it was.

It owns the states and how they are counted; it does not know what the work is. A state is written before the work and
after it, so that an item which kills its process is found begun and is not tried for ever.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["begun", "done", "dropped", "failed", "quarantined"]
SETTLED = frozenset(("done", "dropped", "quarantined"))


@dataclass(slots=True)
class Entry:
    """What the ledger knows of an item."""

    version: str
    state: State
    reason: str = ""
    detail: str = ""
    tries: int = 0


class Ledger:
    """One unit's ledger, in an append-only file of JSON lines; a torn last line is forgotten."""

    def __init__(self, path: Path, attempts: int) -> None:
        self.path = path
        self.attempts = attempts
        self.entries: dict[str, Entry] = {}
        for line in _whole_lines(path):
            self._take(line)

    def settled(self, key: str, version: str) -> bool:
        """Whether nothing is left to do for this version; one that was begun too often is quarantined now."""
        entry = self.entries.get(key)
        if entry is None or entry.version != version:
            return False
        if entry.state not in SETTLED and entry.tries >= self.attempts:
            reason = entry.reason or "killed_its_process"
            self._write(key, version, "quarantined", reason, entry.detail or "it never came to an end")
        return self.entries[key].state in SETTLED

    def begin(self, key: str, version: str) -> None:
        self._write(key, version, "begun")

    def done(self, key: str, version: str) -> None:
        self._write(key, version, "done")

    def drop(self, key: str, version: str, reason: str, detail: str) -> None:
        """It can never be used, for a reason of its own."""
        self._write(key, version, "dropped", reason, detail)

    def fail(self, key: str, version: str, reason: str, detail: str) -> None:
        """It failed unexpectedly and is tried again."""
        self._write(key, version, "failed", reason, detail)

    def withdraw(self, key: str, version: str) -> None:
        """A try that ended for a reason outside the item does not count."""
        entry = self.entries[key]
        self._write(key, version, "failed", "interrupted", "", tries=entry.tries - 1)

    def counts(self) -> dict[str, Counter[str]]:
        """Items by state, and within each by reason."""
        found: dict[str, Counter[str]] = {}
        for entry in self.entries.values():
            found.setdefault(entry.state, Counter())[entry.reason] += 1
        return found

    def _write(
        self, key: str, version: str, state: State, reason: str = "", detail: str = "", tries: int | None = None
    ) -> None:
        line: dict[str, object] = {"key": key, "version": version, "state": state}
        if reason:
            line |= {"reason": reason, "detail": detail[:500]}
        if tries is not None:
            line["tries"] = tries
        append_line(self.path, line)
        self._take(line)

    def _take(self, line: Mapping[str, object]) -> None:
        key, version = str(line["key"]), str(line["version"])
        before = self.entries.get(key)
        tries = before.tries if before is not None and before.version == version else 0
        state: State = line["state"]  # pyright: ignore[reportAssignmentType]
        if state == "begun":
            tries += 1
        said = line.get("tries", tries)
        tries = said if isinstance(said, int) else tries
        self.entries[key] = Entry(version, state, str(line.get("reason", "")), str(line.get("detail", "")), tries)


def append_line(path: Path, line: Mapping[str, object]) -> None:
    """Add a line that outlives a crash; a line torn by an earlier one is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            if torn:
                file.write(b"\n")
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> Iterator[dict[str, object]]:
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def read_lines(path: Path) -> list[dict[str, object]]:
    """The whole lines of a file that `append_line` wrote; none where there is no file."""
    return list(_whole_lines(path))
