"""A store against a dictionary, whatever is done in whatever order: one body for a folder and for S3."""

import hashlib
import tempfile
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from infra.store.artifacts import AlreadyExists, ArtifactNotFound, ArtifactStore, Blob, Conflict, blob_key

NAMES = st.sampled_from(["a", "a-b", "b/c", "b/d/e", "b.json"])
DATA = st.binary(max_size=8)


class StoreMachine(RuleBasedStateMachine):
    """Both do the same; every bytes written are new, as the promise asks of those who swap."""

    store: ArtifactStore

    def __init__(self) -> None:
        super().__init__()
        self.place = uuid4().hex
        self.model: dict[str, bytes] = {}
        self.versions: dict[str, list[str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "file"

    def teardown(self) -> None:
        self.folder.cleanup()
        for digest in self.blobs:
            self.store.delete(blob_key(digest))

    def key(self, name: str) -> str:
        return f"{self.place}/{name}"

    @rule(name=NAMES, data=DATA)
    def create(self, name: str, data: bytes) -> None:
        data += uuid4().bytes
        if name in self.model:
            with pytest.raises(AlreadyExists):
                self.store.create(self.key(name), data)
        else:
            self.versions.setdefault(name, []).append(self.store.create(self.key(name), data))
            self.model[name] = data

    @rule(name=NAMES, data=DATA, age=st.integers(0, 2))
    def swap(self, name: str, data: bytes, age: int) -> None:
        versions = self.versions.get(name, ['"of nothing"'])
        expected = versions[-1 - age] if age < len(versions) else '"of old"'
        data += uuid4().bytes
        if name not in self.model:
            with pytest.raises(ArtifactNotFound):
                self.store.swap(self.key(name), data, expected)
        elif expected != versions[-1]:
            with pytest.raises(Conflict):
                self.store.swap(self.key(name), data, expected)
        else:
            versions.append(self.store.swap(self.key(name), data, expected))
            self.model[name] = data

    @rule(name=NAMES)
    def read(self, name: str) -> None:
        if name in self.model:
            found = self.store.read(self.key(name))
            assert (found.data, found.version) == (self.model[name], self.versions[name][-1])
        else:
            with pytest.raises(ArtifactNotFound):
                self.store.read(self.key(name))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        self.store.delete(self.key(name))
        self.model.pop(name, None)

    @rule(name=NAMES)
    def look(self, name: str) -> None:
        assert self.store.exists(self.key(name)) == (name in self.model)
        assert self.store.size(self.key(name)) == (len(self.model[name]) if name in self.model else None)

    @rule(prefix=st.sampled_from(["", "a", "b/", "b", "x"]))
    def list(self, prefix: str) -> None:
        expected = sorted(self.key(name) for name in self.model if name.startswith(prefix))
        assert self.store.list(self.key(prefix)) == expected

    @rule(data=DATA)
    def put_file(self, data: bytes) -> None:
        data += self.place.encode()
        self.file.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        assert self.store.put_file(self.file) == Blob(digest, len(data))
        self.blobs[digest] = data

    @precondition(lambda self: self.blobs)
    @rule(choice=st.integers(0, 100))
    def fetch_file(self, choice: int) -> None:
        digest = sorted(self.blobs)[choice % len(self.blobs)]
        self.store.fetch_file(digest, self.file)
        assert self.file.read_bytes() == self.blobs[digest]
        assert self.store.measure(digest) == Blob(digest, len(self.blobs[digest]))

    @invariant()
    def nothing_else_is_there(self) -> None:
        assert len(self.store.list(self.place)) == len(self.model)


@pytest.mark.parametrize("store", ["folder", "s3"], indirect=True)
def test_a_store_does_what_a_dictionary_does(store: ArtifactStore) -> None:
    machine = type("Machine", (StoreMachine,), {"store": store})
    examples = 12 if store.url.startswith("file") else 5
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
