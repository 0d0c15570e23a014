"""Both artifact stores under one body of tests, then what only a folder can do wrong."""

import hashlib
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.store.artifacts import (
    AlreadyExists,
    ArtifactCorrupt,
    ArtifactNotFound,
    ArtifactStore,
    Blob,
    Conflict,
    StoreFull,
    StoreRefused,
    blob_key,
)
from infra.store.folder import FolderStore
from infra.store.location import open_store
from infra.store.s3 import S3Store
from tests.s3_server import S3Server

ABSENT = "0" * 64


def a_file(folder: Path, data: bytes, name: str = "weights.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_created_is_read_and_listed(store: ArtifactStore) -> None:
    version = store.create("refs/t2v/promoted.json", b"one")
    store.create("refs/t2v-wide.json", b"")
    store.create("manifests/a.json", b"other")
    assert store.read("refs/t2v/promoted.json").data == b"one"
    assert store.read("refs/t2v/promoted.json").version == version
    assert store.list("refs/") == ["refs/t2v-wide.json", "refs/t2v/promoted.json"]
    assert store.list("refs/t2v/p") == ["refs/t2v/promoted.json"]
    assert store.list() == ["manifests/a.json", "refs/t2v-wide.json", "refs/t2v/promoted.json"]
    assert store.list("nothing/here") == []
    assert store.exists("manifests/a.json")
    assert not store.exists("manifests")


def test_a_second_create_is_refused_and_changes_nothing(store: ArtifactStore) -> None:
    store.create("a", b"first")
    with pytest.raises(AlreadyExists, match="/a already exists"):
        store.create("a", b"second")
    assert store.read("a").data == b"first"


def test_a_stale_swap_is_a_conflict_and_changes_nothing(store: ArtifactStore) -> None:
    old = store.create("ref", b"generation 1")
    new = store.swap("ref", b"generation 2", old)
    with pytest.raises(Conflict, match="not"):
        store.swap("ref", b"generation 3", old)
    assert store.read("ref").data == b"generation 2"
    assert store.read("ref").version == new


def test_what_is_not_there_is_named(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="no/such/key"):
        store.read("no/such/key")
    with pytest.raises(ArtifactNotFound, match="no/such/key"):
        store.swap("no/such/key", b"x", '"any"')
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        store.fetch_file(ABSENT, tmp_path / "out" / "file")
    assert names_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    "key",
    ["", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", ".lock", "a/.b", "a\\b", "a b", "a\n", "é", "k" * 513],
)
def test_a_key_that_leads_out_of_the_store_or_hides_is_refused(tmp_path: Path, key: str) -> None:
    store = FolderStore(tmp_path / "store")
    attempts: list[Callable[[], object]] = [
        lambda: store.create(key, b"x"),
        lambda: store.read(key),
        lambda: store.swap(key, b"x", "0"),
        lambda: store.exists(key),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="is not a store key"):
            attempt()
    with pytest.raises(ValueError, match="is not a store key"):
        store.list("../")
    assert store.list() == []
    assert names_in(tmp_path) == ["store"]


def test_of_sixteen_rival_creators_exactly_one_wins(store: ArtifactStore) -> None:
    barrier = threading.Barrier(16)

    def create(rival: int) -> int | None:
        barrier.wait()
        try:
            store.create("prize", str(rival % 2).encode())
        except AlreadyExists:
            return None
        return rival

    with ThreadPoolExecutor(16) as pool:
        winners = [rival for rival in pool.map(create, range(16)) if rival is not None]
    assert len(winners) == 1
    assert store.read("prize").data == str(winners[0] % 2).encode()


def count_up(store: ArtifactStore, times: int) -> None:
    for _ in range(times):
        while True:
            found = store.read("counter")
            try:
                store.swap("counter", str(int(found.data) + 1).encode(), found.version)
                break
            except Conflict:
                continue


def test_rival_swaps_lose_no_step(store: ArtifactStore) -> None:
    store.create("counter", b"0")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(count_up, [store] * 6, [4] * 6))
    assert store.read("counter").data == b"24"


def count_up_together(store: ArtifactStore, name: str) -> None:
    store.create(f"ready/{name}", b"")
    while len(store.list("ready/")) < 3:
        time.sleep(0.001)
    count_up(store, 10)


def test_rival_processes_lose_no_step_on_a_folder(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.create("counter", b"0")
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(count_up_together, [store] * 3, ["a", "b", "c"]))
    assert store.read("counter").data == b"30"


def test_a_folder_tells_bytes_that_came_back_apart(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first = store.create("ref", b"A")
    store.swap("ref", b"A", store.swap("ref", b"B", first))
    with pytest.raises(Conflict):
        store.swap("ref", b"C", first)


@pytest.mark.parametrize("size", [0, 1, 20_000_003])
def test_a_file_comes_back_as_it_was(store: ArtifactStore, tmp_path: Path, size: int) -> None:
    data = (b"0123456789abcde" * (size // 15 + 1))[:size]
    blob = store.put_file(a_file(tmp_path, data))
    assert blob.size == size
    store.fetch_file(blob.digest, tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == data
    assert names_in(tmp_path / "new") == ["copy"]
    assert store.list("cas/") == [f"cas/sha256/{blob.digest[:2]}/{blob.digest}"]


def test_a_file_stored_twice_is_one_blob(store: ArtifactStore, tmp_path: Path) -> None:
    blobs = {store.put_file(a_file(tmp_path, b"same", name)) for name in ("a", "b")}
    assert blobs == {Blob("0967115f2813a3541eaef77de9d9d5773f1c0c04314b0bbfe4ff3b3b1c55b5d5", 4)}
    assert len(store.list("cas/")) == 1


def test_one_flipped_byte_is_found_and_nothing_appears_at_the_target(store: ArtifactStore, tmp_path: Path) -> None:
    blob = store.put_file(a_file(tmp_path, bytes(1000)))
    key = blob_key(blob.digest)
    store.swap(key, bytes(499) + b"\x01" + bytes(500), store.read(key).version)
    flipped = hashlib.sha256(store.read(key).data).hexdigest()
    target = tmp_path / "out" / "weights"
    with pytest.raises(ArtifactCorrupt, match=f"{key} is corrupt: expected sha256 {blob.digest}, found {flipped}"):
        store.fetch_file(blob.digest, target)
    assert names_in(target.parent) == []


def test_a_corrupt_fetch_leaves_the_file_that_was_there(store: ArtifactStore, tmp_path: Path) -> None:
    blob = store.put_file(a_file(tmp_path, b"good"))
    store.swap(blob_key(blob.digest), b"evil", store.read(blob_key(blob.digest)).version)
    target = a_file(tmp_path, b"precious", "target")
    with pytest.raises(ArtifactCorrupt):
        store.fetch_file(blob.digest, target)
    assert target.read_bytes() == b"precious"


def test_a_truncated_blob_is_mended_by_storing_the_file_again(store: ArtifactStore, tmp_path: Path) -> None:
    path = a_file(tmp_path, b"whole file")
    blob = store.put_file(path)
    store.swap(blob_key(blob.digest), b"whole", store.read(blob_key(blob.digest)).version)
    store.put_file(path)
    store.fetch_file(blob.digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"whole file"


@pytest.mark.parametrize("digest", ["", "abc", "../../../etc/passwd", "A" * 64, "0" * 65])
def test_what_is_no_digest_is_refused(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="is not a sha256 digest"):
        FolderStore(tmp_path / "store").fetch_file(digest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_read_from_a_broken_disk_leaves_no_blob(store: ArtifactStore) -> None:
    # Reading a process's memory at address zero fails like a bad sector does.
    with pytest.raises(OSError, match="Input/output error"):
        store.put_file(Path("/proc/self/mem"))
    assert store.list() == []


def test_a_file_somebody_still_writes_is_not_stored(store: ArtifactStore, tmp_path: Path) -> None:
    path = a_file(tmp_path, bytes(5_000_000))
    done = threading.Event()

    def touch() -> None:
        while not done.is_set():
            os.utime(path)

    writer = threading.Thread(target=touch)
    writer.start()
    try:
        with pytest.raises(ValueError, match="changed while it was being stored"):
            store.put_file(path)
    finally:
        done.set()
        writer.join()
    assert store.list() == []


def test_a_folder_store_keeps_nothing_half_written(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.create("taken", b"x")
    with pytest.raises(AlreadyExists):
        store.create("taken", b"y")
    with pytest.raises(AlreadyExists, match="or is a folder of others"):
        store.create("taken/below", b"y")
    assert names_in(tmp_path / "store" / ".tmp") == []


def test_a_url_opens_its_store(tmp_path: Path, s3_server: S3Server) -> None:
    folder = tmp_path / "a folder"
    for url in (str(folder), folder.as_uri()):
        opened = open_store(url)
        assert isinstance(opened, FolderStore)
        assert opened.root == folder
    opened = open_store("s3://artifacts/runs/one/", s3_server.access)
    assert isinstance(opened, S3Store)
    assert opened.url == "s3://artifacts/runs/one"


@pytest.mark.parametrize("url", ["", "gs://bucket/x", "s3://", "s3://B/x", "s3://bucket/../x", "file://host/x"])
def test_a_url_of_no_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        open_store(url)


def test_a_file_in_the_way_of_a_folder_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreRefused, match=r"weights\.safetensors cannot hold a store"):
        FolderStore(a_file(tmp_path, b""))


def test_a_folder_without_space_is_told_and_nothing_is_half_visible(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    version = store.create("ref", b"old")
    path = a_file(tmp_path, bytes(100_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, before[1])
    )  # the system refuses to write on, as a full disk does
    try:
        for write in (
            lambda: store.put_file(path),
            lambda: store.create("new", bytes(100_000)),
            lambda: store.swap("ref", bytes(100_000), version),
        ):
            with pytest.raises(StoreFull, match=r"store/(cas|new|ref).*free some space there"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.list() == ["ref"] and store.read("ref").data == b"old"
    assert names_in(tmp_path / "store" / ".tmp") == []


def test_a_size_and_a_measure_are_those_of_what_is_stored(store: ArtifactStore, tmp_path: Path) -> None:
    blob = store.put_file(a_file(tmp_path, b"weights"))
    assert store.measure(blob.digest) == blob and store.size(blob_key(blob.digest)) == 7
    store.swap(blob_key(blob.digest), b"cut", store.read(blob_key(blob.digest)).version)
    assert store.measure(blob.digest) == Blob(hashlib.sha256(b"cut").hexdigest(), 3)
    assert store.size("no/such/key") is None
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        store.measure(ABSENT)


def test_files_stored_and_fetched_together_are_those_that_were_there(store: ArtifactStore, tmp_path: Path) -> None:
    paths = {f"{number}.bin": a_file(tmp_path, bytes([number]) * 1000, f"{number}.bin") for number in range(9)}
    blobs = store.put_files(paths)
    store.fetch_files({tmp_path / "out" / name: blob.digest for name, blob in blobs.items()})
    assert {name: (tmp_path / "out" / name).read_bytes() for name in blobs} == {
        name: path.read_bytes() for name, path in paths.items()
    }
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        store.fetch_files({tmp_path / "a": ABSENT, tmp_path / "b": blobs["1.bin"].digest})
    with pytest.raises(FileNotFoundError):
        store.put_files({"there": paths["1.bin"], "gone": tmp_path / "gone"})
