"""Two replicas on one database, killed without warning at random moments under load: no promise is broken."""

from pathlib import Path

import pytest

from tests.chaos.serving import storm
from tests.postgres_server import PostgresServer

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("database", "kills"),
    [
        ("postgresql", 12),
        ("sqlite", 8),
        pytest.param("postgresql", 150, marks=pytest.mark.slow),
        pytest.param("sqlite", 50, marks=pytest.mark.slow),
    ],
)
def test_killed_replicas_lose_no_acknowledged_job_and_make_none_twice(
    database: str, kills: int, postgres: PostgresServer, tmp_path: Path
) -> None:
    url = postgres.new_database() if database == "postgresql" else f"sqlite:///{tmp_path}/jobs.db"
    outcome = storm(tmp_path, url, kills=kills, seed=kills)
    assert outcome.kills == kills
    assert len(outcome.acknowledged) > kills
    assert (outcome.lost, outcome.doubled, outcome.failed) == ([], [], {})
    assert outcome.resumed > 0
    assert {number: len(videos) for number, videos in outcome.contents.items()} == dict.fromkeys(outcome.contents, 1)
