"""Who publishes or promotes is killed at every boundary: there is the old or the new, and the next one goes on."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from infra.registry.registry import Registry
from infra.store.artifacts import ArtifactStore, blob_key
from infra.store.location import open_store
from tests.chaos.promotions import promote, publish
from tests.promotion_kills import REF, killer
from tests.s3_server import S3Server

LARGE = 9 << 20
"""Bytes of a file that S3 gets in parts."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A store's URL and, if it is a server's, where that listens."""
    if request.param == "folder":
        return str(tmp_path / "store"), ""
    server: S3Server = request.getfixturevalue("s3_server")
    return server.url(), server.endpoint


@pytest.fixture
def store(place: tuple[str, str]) -> ArtifactStore:
    url, endpoint = place
    return open_store(url, S3Server(endpoint).access if endpoint else None)


def complete_manifests(store: ArtifactStore) -> Iterator[str]:
    """The digest of each manifest, all files of which must be there."""
    for key in store.list("manifests/"):
        manifest = Registry(store).resolve(Path(key).stem)
        for blob in manifest.files.values():
            assert store.size(blob_key(blob.digest)) == blob.size
        yield manifest.digest


def test_killed_anywhere_in_a_promotion_the_ref_is_the_old_or_the_new(
    place: tuple[str, str], store: ArtifactStore, tmp_path: Path
) -> None:
    registry = Registry(store)
    (tmp_path / "weights").write_bytes(b"weights")
    files = {"weights": tmp_path / "weights"}
    promoted = [publish(registry, files)]
    promote(registry, REF, promoted[0], who="the first")
    moved: list[bool] = []
    with killer(*place) as act_and_die:
        for number in range(1, 1000):
            new = publish(registry, files)
            killed = act_and_die("promote", number, new)
            standing = registry.ref(REF).digest
            assert standing in (promoted[-1], new)
            promoted += [new] if standing == new else []
            moved.append(standing == new)
            if not killed:
                break
            promoted.append(publish(registry, files))
            promote(registry, REF, promoted[-1], who="the next")
            history = registry.history(REF)
            assert [move.digest for move in reversed(history)] == promoted
    assert moved == sorted(moved) and moved.count(False) > 4 and moved[-1], moved
    assert store.clear_unfinished(timedelta(0)) >= 0


def publish_and_die(place: tuple[str, str], store: ArtifactStore, folder: Path, stride: int) -> None:
    registry, weights, small = Registry(store), folder / "weights", folder / "small"
    there = 0
    published: list[bool] = []
    with killer(*place) as act_and_die:
        for number in range(1, 1000, stride):
            weights.write_bytes(os.urandom(LARGE))
            killed = act_and_die("publish", number, weights)
            published.append(len(list(complete_manifests(store))) > there)
            if not killed:
                break
            small.write_bytes(os.urandom(100))
            again = registry.resolve(publish(registry, {"weights": small}))
            assert store.measure(again.files["weights"].digest) == again.files["weights"]
            there = len(store.list("manifests/"))
    assert published == sorted(published) and published.count(False) > 5 and published[-1], published
    assert store.clear_unfinished(timedelta(0)) > 0, "nothing was left half written"
    assert store.clear_unfinished(timedelta(0)) == 0


def test_killed_anywhere_in_a_publication_no_manifest_lacks_a_file(
    place: tuple[str, str], store: ArtifactStore, tmp_path: Path
) -> None:
    publish_and_die(place, store, tmp_path, stride=2 if place[1] else 1)


@pytest.mark.slow
def test_killed_at_every_message_of_a_publication_no_manifest_lacks_a_file(s3_server: S3Server, tmp_path: Path) -> None:
    url = s3_server.url()
    publish_and_die((url, s3_server.endpoint), open_store(url, s3_server.access), tmp_path, stride=1)
