"""Garbage collection: what is kept, what goes and when, and publications that race it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.registry import layout
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.registry.upkeep import claims
from infra.registry.upkeep.collect import Marks, all_manifests, mark, survey, sweep
from infra.store.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore, Conflict, blob_key, blob_of
from infra.store.folder import FolderStore
from model.config import GateRule

RULES = (GateRule(metric="loads", op=">=", bound=1),)
NOW = timedelta(0)
REF = "t2v/promoted"


def publish(registry: Registry, folder: Path, mark: str, parent: Manifest | None = None) -> Manifest:
    folder.mkdir(exist_ok=True)
    for name in ("shared", mark):
        (folder / name).write_text(f"bytes {name}")
    files = {"weights": folder / mark, "config": folder / "shared"}
    parents = {"checkpoint": parent.digest} if parent else {}
    return registry.publish("checkpoint", files, rules=RULES, metrics={"loads": 1}, parents=parents)


def promote(registry: Registry, manifest: Manifest, ref: str = REF) -> None:
    registry.promote(ref, manifest.digest, who="tests", why="next")


def collect(registry: Registry) -> set[str]:
    """Everything that is garbage at this moment, without any grace."""
    mark(registry, keep=NOW, grace=NOW)
    return set(sweep(registry, who="tests", keep=NOW, grace=NOW).due)


def whole(registry: Registry) -> set[str]:
    """Digests of what is published; every file it names must be there."""
    found = all_manifests(registry)
    for digest, manifest in found.items():
        gone = [name for name, blob in manifest.files.items() if not registry.store.exists(blob_key(blob.digest))]
        assert not gone or not registry.store.exists(layout.manifest_key(digest)), f"{digest} stands without {gone}"
    return set(found)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(FolderStore(tmp_path / "store"))


def test_what_refs_reach_is_kept_back_to_the_first_stage_and_the_rest_goes(
    store: ArtifactStore, tmp_path: Path
) -> None:
    registry = Registry(store)
    first = publish(registry, tmp_path / "in", "first")
    second = publish(registry, tmp_path / "in", "second", first)
    promote(registry, second)
    refused = publish(registry, tmp_path / "in", "refused", first)
    orphan = tmp_path / "orphan"
    orphan.write_text("of a publication that broke off")
    lost = store.put_file(orphan)
    gone = {layout.manifest_key(refused.digest), blob_key(refused.files["weights"].digest), blob_key(lost.digest)}

    seen = survey(registry, keep=NOW, grace=NOW)
    assert set(seen.unreachable) == gone and not seen.due
    assert seen.unreachable[blob_key(lost.digest)] == lost.size
    assert not store.list("gc/"), "to survey writes nothing"
    assert set(mark(registry, keep=NOW, grace=NOW).unreachable) == gone
    assert whole(registry) == {first.digest, second.digest, refused.digest}, "to mark deletes nothing"
    assert set(sweep(registry, who="tests", keep=NOW, grace=NOW).due) == gone
    assert whole(registry) == {first.digest, second.digest}
    assert not gone & set(store.list())
    assert registry.fetch(registry.resolve(REF), tmp_path / "out")


def test_the_young_is_kept_and_a_mark_must_be_a_grace_old(registry: Registry, tmp_path: Path) -> None:
    publish(registry, tmp_path / "in", "one")
    assert not mark(registry).unreachable, "made this moment, kept for thirty days"
    assert mark(registry, keep=NOW).unreachable
    assert not sweep(registry, who="tests", keep=NOW).due, "marked this moment, a grace is seven days"
    aged(registry, timedelta(days=8))
    assert sweep(registry, who="tests", keep=NOW).due
    assert not whole(registry)


def aged(registry: Registry, by: timedelta) -> None:
    stored = registry.store.read(layout.MARKS)
    marks = Marks.model_validate_json(stored.data)
    since = {key: when - by for key, when in marks.since.items()}
    registry.store.swap(layout.MARKS, marks.model_copy(update={"since": since}).canonical(), stored.version)


def test_what_is_reached_again_is_spared_and_loses_its_mark(registry: Registry, tmp_path: Path) -> None:
    one = publish(registry, tmp_path / "in", "one")
    mark(registry, keep=NOW)
    aged(registry, timedelta(days=8))
    promote(registry, one)
    assert not sweep(registry, who="tests", keep=NOW).due
    assert whole(registry) == {one.digest}
    mark(registry, keep=NOW)
    assert not Marks.model_validate_json(registry.store.read(layout.MARKS).data).since


def test_what_a_ref_left_is_kept_for_a_while_and_the_one_before_always(registry: Registry, tmp_path: Path) -> None:
    one, two, three = (publish(registry, tmp_path / "in", name) for name in ("one", "two", "three"))
    for each in (one, two, three):
        promote(registry, each)
    assert not mark(registry, keep=timedelta(days=1)).unreachable
    collect(registry)
    assert whole(registry) == {two.digest, three.digest}
    assert registry.rollback(REF, who="tests", why="two was better").digest == two.digest
    with pytest.raises(ArtifactNotFound, match=one.digest):
        registry.rollback(REF, who="tests", why="too far", to=1)
    assert [move.digest for move in registry.history(REF)][-1] == one.digest, "the log outlives what it names"


def test_a_signature_goes_with_its_manifest(registry: Registry, tmp_path: Path) -> None:
    one, two = publish(registry, tmp_path / "in", "one"), publish(registry, tmp_path / "in", "two")
    promote(registry, one)
    places = [layout.signature_key(each.digest, "f" * 64) for each in (one, two)]
    for place in places:
        registry.store.create(place, b"a signature")
    collect(registry)
    assert registry.store.list(layout.SIGNATURES) == [places[0]]


def test_nothing_is_collected_past_a_corrupt_manifest(registry: Registry, tmp_path: Path) -> None:
    one = publish(registry, tmp_path / "in", "one")
    key = layout.manifest_key(one.digest)
    registry.store.swap(key, b"{}", registry.store.read(key).version)
    with pytest.raises(ArtifactCorrupt, match=one.digest):
        mark(registry, keep=NOW)


def test_marks_from_the_future_stop_everything(registry: Registry, tmp_path: Path) -> None:
    publish(registry, tmp_path / "in", "one")
    mark(registry, keep=NOW)
    aged(registry, timedelta(hours=-1))
    with pytest.raises(ValueError, match=r"ahead of this machine's clock; set the clocks right"):
        sweep(registry, who="tests", keep=NOW, grace=NOW)


def test_a_blob_that_a_staying_manifest_names_is_never_deleted(registry: Registry, tmp_path: Path) -> None:
    """Marked as an orphan, named since by an artifact that is itself out of use but not marked."""
    path = tmp_path / "blob"
    path.write_text("bytes later")
    registry.store.put_file(path)
    mark(registry, keep=NOW, grace=NOW)
    later = publish(registry, tmp_path / "in", "later")
    assert not sweep(registry, who="tests", keep=NOW, grace=NOW).due
    assert whole(registry) == {later.digest}


# --- races: a store that stops at a given operation until it is told to go on


class Halting(FolderStore):
    """A folder store whose user is held right before one operation."""

    def __init__(self, root: Path, at: Callable[[str, str], bool]) -> None:
        super().__init__(root)
        self._at, self.reached, self.go = at, threading.Event(), threading.Event()

    def _halt(self, operation: str, key: str) -> None:
        if self._at(operation, key) and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(30)

    def create(self, key: str, data: bytes) -> str:
        self._halt("create", key)
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self._halt("delete", key)
        super().delete(key)


def garbage(registry: Registry, folder: Path) -> Manifest:
    """Something marked and due, whose files a new publication uses again."""
    old = publish(registry, folder, "same")
    mark(registry, keep=NOW, grace=NOW)
    return old


def test_a_sweep_spares_what_a_publication_is_about_to_name(registry: Registry, tmp_path: Path) -> None:
    """It has found the blobs in the store and sent nothing; its manifest is not written yet."""
    old = garbage(registry, tmp_path / "in")
    halting = Halting(tmp_path / "store", lambda operation, key: key.startswith(layout.MANIFESTS))
    with ThreadPoolExecutor(1) as pool:
        publication = pool.submit(publish, Registry(halting), tmp_path / "in", "same")
        assert halting.reached.wait(30)
        assert set(sweep(registry, who="tests", keep=NOW, grace=NOW).due) == {layout.manifest_key(old.digest)}
        halting.go.set()
        new = publication.result()
    assert whole(registry) == {new.digest}
    assert not registry.store.list(layout.CLAIMS)


def test_a_publication_waits_for_a_sweep_that_is_deleting_what_it_would_use_again(
    registry: Registry, tmp_path: Path
) -> None:
    garbage(registry, tmp_path / "in")
    halting = Halting(tmp_path / "store", lambda operation, key: operation == "delete" and key.startswith("cas/"))
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(sweep, Registry(halting), who="tests", keep=NOW, grace=NOW)
        assert halting.reached.wait(30)
        publication = pool.submit(publish, registry, tmp_path / "in", "same")
        with pytest.raises(TimeoutError):
            publication.result(timeout=1)
        halting.go.set()
        assert len(running.result().due) == 3
        new = publication.result()
    assert whole(registry) == {new.digest}, "what was deleted was stored anew"


def test_a_promotion_that_meets_a_sweep_moves_no_ref_to_what_is_gone(registry: Registry, tmp_path: Path) -> None:
    old = garbage(registry, tmp_path / "in")
    halting = Halting(tmp_path / "store", lambda operation, key: operation == "delete" and key.startswith("manifests/"))
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(sweep, Registry(halting), who="tests", keep=NOW, grace=NOW)
        assert halting.reached.wait(30)
        promotion = pool.submit(promote, registry, old)
        halting.go.set()
        running.result()
        with pytest.raises(ArtifactNotFound):
            promotion.result()
    assert not registry.refs()


def test_there_is_one_sweep_at_a_time_and_a_killed_one_is_taken_over(registry: Registry, tmp_path: Path) -> None:
    garbage(registry, tmp_path / "in")
    with (
        claims.sweeping(registry.store, [], who="ann", lasts=timedelta(minutes=1)),
        pytest.raises(Conflict, match="ann has been sweeping since"),
    ):
        sweep(registry, who="bob", keep=NOW, grace=NOW)
    killed = claims.Sweep(keys=(), who="ann", since=PAST, stops=PAST, expires=PAST)
    registry.store.create(layout.SWEEP, killed.canonical())
    assert sweep(registry, who="bob", keep=NOW, grace=NOW).due
    assert not registry.store.exists(layout.SWEEP)


PAST = datetime(2020, 1, 1, tzinfo=UTC)


def test_what_a_killed_publication_claimed_is_free_after_a_week(registry: Registry, tmp_path: Path) -> None:
    old = garbage(registry, tmp_path / "in")
    held = tuple(blob_key(blob.digest) for blob in old.files.values())
    claim = claims.Claim(keys=held, since=datetime.now(UTC))
    registry.store.create("gc/claims/killed.json", claim.canonical())
    assert set(sweep(registry, who="tests", keep=NOW, grace=NOW).due) == {layout.manifest_key(old.digest)}
    mark(registry, keep=NOW, grace=NOW)
    stored = registry.store.read("gc/claims/killed.json")
    registry.store.swap("gc/claims/killed.json", claim.model_copy(update={"since": PAST}).canonical(), stored.version)
    assert set(sweep(registry, who="tests", keep=NOW, grace=NOW).due) == set(held)
    assert not registry.store.list(layout.CLAIMS)


def test_publications_promotions_and_sweeps_at_once_never_leave_a_manifest_without_its_files(
    store: ArtifactStore, tmp_path: Path
) -> None:
    """Four publishers share few contents, so that each uses again what a sweep is after."""
    registry, done = Registry(store), threading.Event()
    promoted: list[str] = []

    def publisher(number: int) -> None:
        mine = Registry(store)
        for turn in range(6):
            manifest = publish(mine, tmp_path / f"in{number}", f"content-{(turn + number) % 2}")
            try:
                promote(mine, manifest, f"ref{number}/promoted")
            except ArtifactNotFound:  # without a grace a sweep may come between publication and promotion
                continue
            promoted.append(manifest.digest)

    def collector() -> int:
        swept = 0
        while not done.is_set():
            swept += len(collect(registry))
        return swept

    with ThreadPoolExecutor(5) as pool:
        sweeps = pool.submit(collector)
        try:
            for work in [pool.submit(publisher, number) for number in range(4)]:
                work.result(timeout=200)
        finally:
            done.set()
        assert sweeps.result(timeout=100) > 0
    current = {registry.ref(name).digest for name in registry.refs()}
    assert current <= set(promoted) and current <= whole(registry)


def test_a_claim_leaves_nothing_behind(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with claims.claimed(registry.store, [blob_key(blob_of(path).digest)]):
        assert len(registry.store.list(layout.CLAIMS)) == 1
    assert registry.store.list() == []
