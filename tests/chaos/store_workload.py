"""Rival clients of one store and its registry, what each was told, and the verdict on all of it.

It owns the mix of operations, the record and the three counts that must be zero; faults on the way are the link's.
"""

import itertools
import queue
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.registry.registry import Registry
from infra.store.artifacts import AlreadyExists, ArtifactCorrupt, ArtifactNotFound, ArtifactStore, Conflict, blob_key
from infra.store.location import open_store
from tests.chaos.linearizability import Operation, lost_writes, register, stuck_at
from tests.chaos.promotions import promote, publish
from tests.chaos.proxy import FaultyLink
from tests.s3_server import ServerProcess

CLIENTS = 16
RIVALRY = 40
"""Operations before clients turn to a new key: old ones are swapped, new ones are created in rivalry."""
TIMEOUT = 1.0
"""Seconds: shorter than the link's delay, so that some requests arrive when nobody waits any more."""
LARGE = 9 << 20
"""Bytes of a file that goes in parts."""


@dataclass
class Verdict:
    """What the recorded histories show; all but the first two must be zero."""

    operations: int
    outcomes_unknown: int
    not_linearizable: list[str] = field(default_factory=list)
    writes_lost: list[str] = field(default_factory=list)
    files_missing: list[str] = field(default_factory=list)


def in_a_storm(
    process: ServerProcess, scratch: Path, *, operations: int, kill_every: int, seed: int
) -> tuple[Verdict, Counter[str]]:
    """The verdict on rivals whose way to the server is faulty, and the faults they met.

    After each `kill_every` operations the server is killed and started again.
    """
    url = process.server.url()
    with closing(FaultyLink(process.server.endpoint, seed=seed, late=1.5 * TIMEOUT)) as link:
        link.calm.set()
        access = replace(process.server.access, endpoint=link.endpoint, timeout=TIMEOUT)
        workload = Workload(open_store(url, access), scratch, operations=operations, seed=seed)
        workload.every(kill_every, process.restart)
        link.calm.clear()
        workload.run()
    return workload.verdict(open_store(url, process.server.access)), link.done


class Workload:
    """`run` makes clients work until so many operations are done; `verdict` reads what is left behind.

    `every` calls a function each time that many operations have been begun, such as one that kills the server.
    """

    def __init__(self, store: ArtifactStore, scratch: Path, *, operations: int, seed: int) -> None:
        self.store = store
        self.registry = Registry(store)
        self.scratch = scratch
        self._operations = operations
        self._seed = seed
        self._numbers = itertools.count()
        self.records: list[Operation] = []
        self.published: list[str] = []
        self.missing: list[str] = []
        self._disturb: Callable[[], None] = lambda: None
        self._disturb_every = 0
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def every(self, operations: int, call: Callable[[], None]) -> None:
        self._disturb, self._disturb_every = call, operations

    def run(self) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._client, number) for number in range(CLIENTS)]
            working = CLIENTS
            while working:  # here, since a process one starts ends with the thread that has started it
                call = self._calls.get()
                working -= call is None
                if call:
                    call()
        for client in clients:
            client.result()

    def verdict(self, store: ArtifactStore) -> Verdict:
        """`store` is the same one on an undisturbed way; its reads are the last of every history."""
        found = Verdict(self._operations, sum(record.returned is None for record in self.records))
        histories: dict[str, list[Operation]] = {record.key: [] for record in self.records}
        for record in _settled(self.records, store):
            histories[record.key].append(record)
        for key, history in sorted(histories.items()):
            last = _last(store, key)
            moment = time.monotonic_ns()
            history.append(Operation(CLIENTS, "read", key, None, last, moment, moment + 1))
            if stuck := stuck_at(history, None, register):
                found.not_linearizable.append(f"{key}: {stuck}")
            found.writes_lost += [f"{key}: {lost}" for lost in lost_writes(history, last)]
        for digest in self.published:
            found.writes_lost += [f"publication {digest}: {problem}" for problem in _incomplete(store, digest)]
        found.files_missing = list(self.missing)
        return found

    def _client(self, number: int) -> None:
        client = _Client(self, number, random.Random(f"{self._seed}-{number}"))
        try:
            while (turn := next(self._numbers)) < self._operations:
                if self._disturb_every and turn % self._disturb_every == self._disturb_every - 1:
                    self._calls.put(self._disturb)
                client.work(turn)
        finally:
            self._calls.put(None)


class _Client:
    """One of the rivals: what it saw last, and a file of its own to publish."""

    def __init__(self, workload: Workload, number: int, chance: random.Random) -> None:
        self._of = workload
        self._number = number
        self._chance = chance
        self._seen: dict[str, tuple[str, str]] = {}
        self._ready: list[str] = []
        self._file = workload.scratch / f"client-{number}"

    def work(self, turn: int) -> None:
        age = self._chance.choice([0, 0, 0, 1])
        key = f"chaos/{max(0, turn // RIVALRY - age)}"
        ref = f"stage{turn // (4 * RIVALRY)}/promoted"
        if self._chance.random() < 0.7:
            if key not in self._seen and self._chance.random() < 0.5:
                self._create(key, f"{self._number}-{turn}")
            elif key in self._seen and self._chance.random() < 0.6:
                self._swap(key, f"{self._number}-{turn}")
            else:
                self._read(key)
        elif self._ready:
            self._promote(ref, self._ready.pop())
        elif self._chance.random() < 0.5:
            self._publish()
        else:
            self._resolve(ref)

    def _create(self, key: str, value: str) -> None:
        with self._recorded("write", key, (None, value), AlreadyExists) as told:
            self._seen[key] = (self._of.store.create(key, value.encode()), value)
            told.append("done")

    def _swap(self, key: str, value: str) -> None:
        version, expected = self._seen.pop(key)
        with self._recorded("write", key, (expected, value), Conflict) as told:
            self._seen[key] = (self._of.store.swap(key, value.encode(), version), value)
            told.append("done")

    def _read(self, key: str) -> None:
        with self._recorded("read", key, None) as told:
            try:
                found = self._of.store.read(key)
            except ArtifactNotFound:
                told.append(None)
                return
            told.append(found.data.decode())
            self._seen[key] = (found.version, found.data.decode())

    def _publish(self) -> None:
        size = LARGE if self._chance.random() < 0.05 else self._chance.randrange(50_000)
        self._file.write_bytes(self._chance.randbytes(size))
        try:
            digest = publish(self._of.registry, {"weights": self._file, "same": Path(__file__)})
        except ConnectionError:
            return
        self._of.published.append(digest)
        self._ready.append(digest)

    def _promote(self, ref: str, digest: str) -> None:
        called = time.monotonic_ns()
        try:
            previous = promote(self._of.registry, ref, digest, who=f"client {self._number}")
        except Conflict:
            return
        except ArtifactNotFound as error:
            self._of.missing.append(str(error))
            return
        except ConnectionError:
            self._note("promote", f"refs/{ref}", digest, None, called, None)
            return
        self._note("write", f"refs/{ref}", (previous, digest), "done", called, time.monotonic_ns())

    def _resolve(self, ref: str) -> None:
        with self._recorded("read", f"refs/{ref}", None) as told:
            try:
                manifest = self._of.registry.resolve(ref)
            except ArtifactNotFound as error:
                if "manifests/" in str(error):
                    self._of.missing.append(str(error))
                told.append(None)
                return
            told.append(manifest.digest)
            for name, blob in manifest.files.items():
                try:
                    self._of.store.fetch_file(blob.digest, self._file.with_suffix(".fetched"))
                except (ArtifactNotFound, ArtifactCorrupt) as error:
                    self._of.missing.append(f"{name} of {manifest.digest}: {error}")

    @contextmanager
    def _recorded(
        self, kind: str, key: str, argument: Any, refusal: type[Exception] | None = None
    ) -> Iterator[list[Any]]:
        """Note what the body told; a write that was told nothing may have happened, a read says nothing then."""
        told: list[Any] = []
        called = time.monotonic_ns()
        try:
            yield told
        except ConnectionError:
            if not told and kind == "write":
                self._note(kind, key, argument, None, called, None)
                return
        except (Conflict, AlreadyExists) as error:
            if refusal is None or not isinstance(error, refusal):
                raise
            told.append("refused")
        if told:
            self._note(kind, key, argument, told[0], called, time.monotonic_ns())

    def _note(self, kind: str, key: str, argument: Any, result: Any, called: int, returned: int | None) -> None:
        self._of.records.append(Operation(self._number, kind, key, argument, result, called, returned))


def _last(store: ArtifactStore, key: str) -> str | None:
    """What a key holds, or the digest a ref points at."""
    try:
        if key.startswith("refs/"):
            return Registry(store).ref(key.removeprefix("refs/")).digest
        return store.read(key).data.decode()
    except ArtifactNotFound:
        return None


def _settled(records: list[Operation], store: ArtifactStore) -> list[Operation]:
    """With promotions whose answer was lost as the log has them: what each replaced; those it lacks took no place."""
    took_place: dict[tuple[str, str], str | None] = {}
    for key in {record.key for record in records if record.key.startswith("refs/")}:
        if _last(store, key):
            took_place |= {
                (key, move.digest): move.previous for move in Registry(store).history(key.removeprefix("refs/"))
            }
    settled = [record for record in records if record.kind != "promote"]
    for lost in records:
        if lost.kind == "promote" and (lost.key, lost.argument) in took_place:
            pair = (took_place[lost.key, lost.argument], lost.argument)
            settled.append(Operation(lost.client, "write", lost.key, pair, None, lost.called, None))
    return settled


def _incomplete(store: ArtifactStore, digest: str) -> list[str]:
    try:
        manifest = Registry(store).resolve(digest)
    except ArtifactNotFound as error:
        return [str(error)]
    return [name for name, blob in manifest.files.items() if store.size(blob_key(blob.digest)) != blob.size]
