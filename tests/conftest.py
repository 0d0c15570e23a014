"""What every test gets: a quiet, offline, two-core-friendly environment, and golden files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Read by libraries when they are first imported, so set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("METAFLOW_USER", "tests")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it for its workers, and a console keeps what it finds first

pytest_plugins = ["tests.api_server", "tests.postgres_server", "tests.s3_server", "tests.tiny_export"]

GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden files instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare a text with the committed file `tests/golden/NAME`; `make golden` rewrites it."""
    rewrite = bool(request.config.getoption("--rewrite-golden"))

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if rewrite:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"{path} is missing; run `make golden` and commit it"
        assert text == path.read_text(), f"{name} has changed; if that is meant, run `make golden` and read its diff"

    return compare
