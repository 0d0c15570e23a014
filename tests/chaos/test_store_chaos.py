"""Sixteen rivals on one store, over a way that drops, doubles and tears, to a server that is killed under them."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.store.folder import FolderStore
from tests.chaos.store_workload import Verdict, Workload, in_a_storm
from tests.s3_server import ServerProcess, running_process

pytestmark = pytest.mark.timeout(3600)
OPERATIONS, NIGHTLY_OPERATIONS = 500, 10_000


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_process(tmp_path_factory.mktemp("weed")) as process:
        yield process


def sound(verdict: Verdict) -> bool:
    assert not verdict.not_linearizable
    assert not verdict.writes_lost
    assert not verdict.files_missing
    return True


def survived(process: ServerProcess, scratch: Path, operations: int, kill_every: int) -> bool:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    verdict, faults = in_a_storm(process, scratch, operations=operations, kill_every=kill_every, seed=seed)
    assert len(faults) > 10 and faults["drop_answer"] > operations // 50
    return sound(verdict) and verdict.operations == operations


def test_what_rivals_do_in_a_storm_could_have_happened_one_at_a_time(process: ServerProcess, tmp_path: Path) -> None:
    assert survived(process, tmp_path, OPERATIONS, kill_every=300)


@pytest.mark.slow
def test_ten_thousand_operations_in_a_storm(process: ServerProcess, tmp_path: Path) -> None:
    assert survived(process, tmp_path, NIGHTLY_OPERATIONS, kill_every=2_000)


def test_what_rivals_do_to_a_folder_could_have_happened_one_at_a_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    workload = Workload(store, tmp_path, operations=OPERATIONS, seed=1)
    workload.run()
    assert sound(workload.verdict(store))
