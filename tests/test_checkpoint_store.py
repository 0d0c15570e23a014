"""Checkpoints in a store: a run goes on from them on an empty machine; a store that is away stops nobody at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra.checkpoints import POINTER, StoreSink
from infra.store.artifacts import AlreadyExists, ArtifactCorrupt, ArtifactStore, Conflict
from infra.store.folder import FolderStore
from model.checkpoint.folder import latest, verify
from model.checkpoint.reader import Reader
from model.checkpoint.sink import restore
from model.checkpoint.state import PARTS
from model.checkpoint.writer import CheckpointWriter
from tests.checkpoint_kills import killer
from tests.checkpoints import cut, flip, gang, same, save, save_cut, state, tensors


def sinks(store: ArtifactStore, ranks: int) -> list[StoreSink]:
    """Every rank has its own; rank 0's has looked what is there, as `restore` does."""
    found = [StoreSink(store) for _ in range(ranks)]
    found[0].latest()
    return found


def test_a_run_goes_on_on_an_empty_machine(store: ArtifactStore, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = save_cut(tmp_path / "here", tensors(step), step, 2, keep=2, sinks=sinks(store, 2))
    for empty in ("there", "elsewhere"):
        found = restore(tmp_path / empty, StoreSink(store))
        assert found is not None and found == latest(tmp_path / empty) == tmp_path / empty / "step-00000003"
        assert verify(found) == verify(folder)
        for part in PARTS:
            assert same(Reader(found).whole(part), tensors(3)[part])
    sink = StoreSink(store)
    restore(tmp_path / "there", sink)
    save_cut(tmp_path / "there", tensors(4), 4, 3, sinks=[sink, *sinks(store, 3)[1:]])
    assert restore(tmp_path / "elsewhere", StoreSink(store)) == tmp_path / "elsewhere" / "step-00000004"


def test_a_run_without_any_checkpoint_begins_anew(store: ArtifactStore, tmp_path: Path) -> None:
    assert restore(tmp_path, StoreSink(store)) is None


def test_what_is_newer_here_stays(store: ArtifactStore, tmp_path: Path) -> None:
    save_cut(tmp_path / "a", tensors(1), 1, 1, sinks=sinks(store, 1))
    save(tmp_path / "a", state(step=2), keep=2)
    assert restore(tmp_path / "a", StoreSink(store)) == tmp_path / "a" / "step-00000002"


def test_the_store_keeps_what_the_run_folder_keeps_and_nothing_else(store: ArtifactStore, tmp_path: Path) -> None:
    store.create("cas/sha256/ab/" + "ab" * 32, b"of a rank that was killed while it sent")
    for step in (1, 2, 3, 4):
        save_cut(tmp_path, tensors(step), step, 2, keep=2, sinks=sinks(store, 2))
    kept = [key for key in store.list("checkpoints/") if key != POINTER]
    assert [key.split("/")[1].split(".")[0] for key in kept] == ["step-00000003", "step-00000004"]
    files = {file["sha256"] for key in kept for file in json_of(store, key)["files"].values()}
    assert {key.rsplit("/", 1)[1] for key in store.list("cas/")} == files


def json_of(store: ArtifactStore, key: str) -> dict[str, Any]:
    return json.loads(store.read(key).data)


@pytest.mark.timeout(600)
def test_killed_anywhere_on_the_way_the_store_has_the_old_or_the_new(tmp_path: Path) -> None:
    """At every third touch of the file system, which the store lies in too; then the run goes on."""
    base = tmp_path / "base"
    save_cut(base / "run", tensors(1), 1, 1, keep=2, sinks=sinks(FolderStore(base / "store"), 1))
    left: list[int] = []
    with killer() as save_and_die:
        for number in range(1, 1000, 3):
            here = tmp_path / f"at-{number}"
            shutil.copytree(base, here)
            if not save_and_die(here / "run", number, step=2, ranks=1, store=here / "store"):
                break
            (sink,) = sinks(FolderStore(here / "store"), 1)
            found = restore(here / "empty", sink)
            assert found is not None
            verify(found)
            left.append(Reader(found).step)
            standing = restore(here / "run", sink)
            assert standing is not None
            step = Reader(standing).step + 1
            save_cut(here / "run", tensors(step), step, 1, sinks=[sink])
            gone_on = restore(here / "empty", StoreSink(FolderStore(here / "store")))
            assert gone_on is not None and same(Reader(gone_on).whole("ema"), tensors(step)["ema"])
            shutil.rmtree(here)
    assert left.count(1) > 5 and left.count(2) > 5 and left == sorted(left), left


def test_a_damaged_file_in_the_store_is_never_put_in_place(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    save_cut(tmp_path / "here", tensors(1), 1, 1, sinks=sinks(store, 1))
    for key in store.list("cas/"):
        flip(tmp_path / "store" / key, -1)
        with pytest.raises(ArtifactCorrupt, match="expected sha256"):
            restore(tmp_path / "there", StoreSink(store))
        assert latest(tmp_path / "there") is None
        flip(tmp_path / "store" / key, -1)
    (manifest,) = (key for key in store.list("checkpoints/") if key != POINTER)
    flip(tmp_path / "store" / manifest, 30)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        restore(tmp_path / "there", StoreSink(store))
    assert latest(tmp_path / "there") is None
    flip(tmp_path / "store" / manifest, 30)
    assert restore(tmp_path / "there", StoreSink(store)) == tmp_path / "there" / "step-00000001"


def test_of_two_runs_that_save_to_one_place_the_older_is_told(store: ArtifactStore, tmp_path: Path) -> None:
    (older,) = sinks(store, 1)
    writer = CheckpointWriter(tmp_path / "older", keep=2, sink=older)
    writer.save(state(step=1))
    writer.wait()
    save_cut(tmp_path / "newer", tensors(2), 2, 1, sinks=sinks(store, 1))
    writer.save(state(step=9))
    with pytest.raises(Conflict, match=r"moved by another process, to step-00000002"):
        writer.wait()
    assert restore(tmp_path / "empty", StoreSink(store)) == tmp_path / "empty" / "step-00000002"


def test_a_checkpoint_that_was_cut_off_on_its_way_is_finished_by_the_same_again(
    store: ArtifactStore, tmp_path: Path
) -> None:
    (sink,) = sinks(store, 1)
    folder = save(tmp_path / "a", state(step=1), keep=1)
    manifest = (folder / "manifest.json").read_bytes()
    sink.commit(folder.name, manifest)
    sink.commit(folder.name, manifest)
    assert StoreSink(store).latest() is None, "nothing points to it yet"
    save_cut(tmp_path / "b", tensors(1), 1, 1, sinks=[sink])
    assert restore(tmp_path / "c", StoreSink(store)) == tmp_path / "c" / "step-00000001"


def test_a_registrys_store_is_refused(store: ArtifactStore) -> None:
    store.create("refs/t2v/promoted.json", b"{}")
    with pytest.raises(ValueError, match="a place of their own"):
        StoreSink(store)


def test_a_run_has_its_own_place_below_a_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.create("refs/t2v/promoted.json", b"{}")
    sink = StoreSink.open(str(tmp_path / "store"), "t2v")
    sink.latest()
    save_cut(tmp_path / "run", tensors(1), 1, 1, sinks=[sink])
    assert all(key.startswith(("refs/", "runs/t2v/")) for key in store.list())


class _Cable(FolderStore):
    """A store one can pull the plug of, as a server that is away."""

    plugged = True

    def create(self, key: str, data: bytes) -> str:
        if not self.plugged:
            raise ConnectionError("no answer")
        return super().create(key, data)


def test_a_store_that_is_away_is_told_and_only_in_the_end_stops_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cable = _Cable(tmp_path / "store")
    writers = gang(tmp_path / "run", 2, keep=9, sinks=sinks(cable, 2))

    def save_all(step: int) -> None:
        for rank, writer in enumerate(writers):
            writer.save(cut(tensors(step), step, rank, 2))
        for writer in writers:
            writer.wait()

    save_all(1)
    cable.plugged = False
    save_all(2)
    assert "step-00000002 is on this machine alone: no answer" in caplog.text
    save_all(3)
    cable.plugged = True
    save_all(4)
    assert restore(tmp_path / "empty", StoreSink(cable)) == tmp_path / "empty" / "step-00000004"
    cable.plugged = False
    save_all(5)
    save_all(6)
    with pytest.raises(ConnectionError, match="the last 3 checkpoints are on this machine alone: no answer"):
        save_all(7)
    assert latest(tmp_path / "run") == tmp_path / "run" / "step-00000007"


def test_the_same_file_is_not_sent_or_read_twice(store: ArtifactStore, tmp_path: Path) -> None:
    folder = save(tmp_path, state(step=1), keep=1)
    entry = json_of_file(folder)["files"]["state.json"]
    sink = StoreSink(store)
    sink.put(folder / "state.json", entry)
    with pytest.raises(AlreadyExists):
        store.create(f"cas/sha256/{entry['sha256'][:2]}/{entry['sha256']}", b"")
    sink.put(folder / "state.json", entry)
    shutil.copy(folder / "recipe.json", folder / "state.json")
    with pytest.raises(ValueError, match=r"state\.json has \d+ bytes where \d+ were written"):
        sink.put(folder / "state.json", entry)


def json_of_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())
