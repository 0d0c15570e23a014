"""Canaries of every kind beside a stable server under live load: each ends as it must, and no user notices."""

import shutil
import time
from collections.abc import Iterator

import httpx
import pytest

from infra.rollout.home import Home
from tests.canaries.load import users
from tests.canaries.server import KINDS
from tests.canaries.table import new_home, plan, play

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no `prometheus` on this machine")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = new_home(tmp_path_factory.mktemp("home"))
    try:
        yield home
    finally:
        home.down()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wrong_canary_gets_no_request_and_a_crashing_one_costs_no_request(home: Home) -> None:
    wrong = play(home, "wrong-output", plan(deadline_s=300))
    assert wrong.outcome.decision == "abort" and "dB to stable's, at least 30" in wrong.outcome.reason
    assert [seen.weight for seen in wrong.outcome.observations] == [0], "no user's video was made by it"

    crashing = play(home, "crashing", plan(deadline_s=300, min_samples=10_000))
    assert crashing.outcome.decision == "abort", crashing.outcome.reason
    assert {seen.weight for seen in crashing.outcome.observations} == {0, 50}
    for row in (wrong, crashing):
        assert not row.failures and row.made > 0
        assert row.outcome.seconds_to_roll_back is not None and row.outcome.seconds_to_roll_back < 30
    assert home.weight() == 0 and home.canary_engine is None and home.stable_engine == "good"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_canary_ends_as_it_must(home: Home, kind: str) -> None:
    silent = kind in ("no-traffic", "metrics-down")
    row = play(home, kind, plan(deadline_s=45 if silent else 500))
    assert row.is_right, row.outcome.reason
    assert not row.failures
    if silent:
        assert row.outcome.reason.startswith("deadline: inconclusive after 45 s: ")
    assert home.canary_engine is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_users_notice_nothing_of_a_stable_server_that_is_replaced(home: Home) -> None:
    before = home.state.stable
    with users(home.url, 4) as seen:
        home.replace_stable("good")
        deadline = time.monotonic() + 300
        while before.keeper.find() is not None:
            assert time.monotonic() < deadline, "the old server does not end"
            time.sleep(0.2)
    assert seen.made > 0 and not seen.failures
    assert httpx.get(f"{home.url}/ready").status_code == 200
