"""Sixteen rivals on one store, over a way that drops, doubles and tears, to a server that is killed under them."""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from infra.store.folder import FolderStore
from infra.store.location import open_store
from tests.chaos.proxy import FaultyLink
from tests.chaos.store_workload import Verdict, Workload
from tests.s3_server import ServerProcess, running_process

pytestmark = pytest.mark.timeout(900)
OPERATIONS, NIGHTLY_OPERATIONS = 500, 10_000
TIMEOUT = 2.0
"""Seconds: shorter than the link's delay, so that some requests arrive when nobody waits any more."""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_process(tmp_path_factory.mktemp("weed")) as process:
        yield process


def sound(verdict: Verdict) -> bool:
    assert not verdict.not_linearizable
    assert not verdict.writes_lost
    assert not verdict.files_missing
    return True


def rivals_in_a_storm(process: ServerProcess, scratch: Path, operations: int, kill_every: int) -> Verdict:
    server, seed = process.server, random.randrange(10**6)
    print(f"seed {seed}")
    url = server.url()
    with closing(FaultyLink(server.endpoint, seed=seed)) as link:
        link.calm.set()
        access = replace(server.access, endpoint=link.endpoint, timeout=TIMEOUT)
        workload = Workload(open_store(url, access), scratch, operations=operations, seed=seed)
        workload.every(kill_every, process.restart)
        link.calm.clear()
        workload.run()
    print(dict(link.done))
    assert len(link.done) > 10 and link.done["drop_answer"] > operations // 50
    return workload.verdict(open_store(url, server.access))


def test_what_rivals_do_in_a_storm_could_have_happened_one_at_a_time(process: ServerProcess, tmp_path: Path) -> None:
    verdict = rivals_in_a_storm(process, tmp_path, OPERATIONS, kill_every=300)
    assert sound(verdict) and verdict.operations == OPERATIONS


@pytest.mark.slow
def test_ten_thousand_operations_in_a_storm(process: ServerProcess, tmp_path: Path) -> None:
    verdict = rivals_in_a_storm(process, tmp_path, NIGHTLY_OPERATIONS, kill_every=2_000)
    assert sound(verdict) and verdict.operations == NIGHTLY_OPERATIONS


def test_what_rivals_do_to_a_folder_could_have_happened_one_at_a_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    workload = Workload(store, tmp_path, operations=OPERATIONS, seed=1)
    workload.run()
    assert sound(workload.verdict(store))
