"""What `stiv promote` says if the store is gone before it has answered, and what stands there once it is back."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from flows import cli
from infra.registry.registry import Registry
from infra.store.location import open_store
from tests.chaos.promotions import promote, publish
from tests.chaos.proxy import FaultyLink, Request
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

REF = "t2v/promoted"
Stiv = Callable[..., tuple[int, str]]


@pytest.fixture
def stiv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stiv:
    """A command as a user runs it: its exit code and what it says of an error."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("infra.store.s3_client.LONGEST_PAUSE", 0.1)  # seven attempts take seconds otherwise

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["stiv", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@contextmanager
def gone_at(server: S3Server, monkeypatch: pytest.MonkeyPatch, place: str, fault: str) -> Iterator[FaultyLink]:
    """A way to the server that does `fault` to the first write in `place`, and nothing passes from then on."""
    down: list[str] = []

    def script(request: Request) -> str:
        if down:
            return "drop_request"
        if request.method == "PUT" and f"/{place}/" in request.target:
            down.append(place)
            return fault
        return ""

    with closing(FaultyLink(server.endpoint, script=script)) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.endpoint)
        yield link


@pytest.mark.parametrize(("fault", "took_place"), [("drop_answer", True), ("drop_request", False)])
def test_a_promotion_without_an_answer_says_that_nobody_can_tell_and_may_be_repeated(
    s3_server: S3Server, stiv: Stiv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, took_place: bool
) -> None:
    url = s3_server.url()
    registry = Registry(open_store(url, s3_server.access))
    (tmp_path / "weights").write_bytes(b"weights")
    old, new = (publish(registry, {"weights": tmp_path / "weights"}) for _ in range(2))
    promote(registry, REF, old, who="ann")
    command = ("promote", new, REF, "--why", "better", "--store", url)
    with gone_at(s3_server, monkeypatch, "refs", fault) as link:
        code, said = stiv(*command)
        assert code == 1 and said.count("\n") == 1
        assert f"'{REF}' points at {new} or still at what it did, which nobody can tell now" in said
        assert f"look at `stiv history {REF}` once the store answers, and promote again" in said
        standing = registry.ref(REF)
        assert standing.digest == (new if took_place else old)
        link.calm.set()
        assert stiv(*command)[0] == 0
    assert [move.digest for move in registry.history(REF)] == [new, old]
    assert registry.ref(REF) == standing or not took_place, "the same promotion again changes nothing"


def test_a_promotion_that_could_not_be_written_down_was_not_made(
    s3_server: S3Server, stiv: Stiv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = s3_server.url()
    registry = Registry(open_store(url, s3_server.access))
    (tmp_path / "weights").write_bytes(b"weights")
    digest = publish(registry, {"weights": tmp_path / "weights"})
    command = ("promote", digest, REF, "--why", "first", "--store", url)
    with gone_at(s3_server, monkeypatch, "reflog", "drop_answer") as link:
        code, said = stiv(*command)
        assert code == 1 and f"'{REF}' was not moved" in said
        assert registry.refs() == ()
        link.calm.set()
        assert stiv(*command)[0] == 0
    assert [move.generation for move in registry.history(REF)] == [2], "the first entry of the log is of no move"
