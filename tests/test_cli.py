"""`stiv`: what a user sees, above all when the input is wrong: one line that names the value, and exit code 1."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from infra.store.location import open_store

Stiv = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stiv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Stiv:
    """Run a command in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["stiv", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_recipe_prints_the_resolved_tree_with_overrides(stiv: Stiv) -> None:
    code, out, _ = stiv("recipe", "tiny", "--set", "t2v.training.steps=7")
    assert code == 0
    stages = {stage["name"]: stage for stage in json.loads(out)["stages"]}
    assert stages["t2v"]["training"]["steps"] == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("recipe", "tinny"), ["tinny", "built in: ['m', 'tiny', 'xl', 'xxl']"]),
        (("recipe", "tiny", "--set", "t2v.training.stpes=7"), ["t2v.training.stpes", "did you mean 'steps'"]),
        (("recipe", "tiny", "--set", "t2v.network.num_heads=7"), ["hidden_size 160", "num_heads 7"]),
        (("recipe", "tiny", "--set", "*.training.zero_stage=3"), ["zero_stage 3", "use zero_stage 2"]),
        (("train", "t2w"), ["no stage 't2w'", "t2i"]),
        (("export", "t2v/promoted", "--store", "store"), ["t2v/promoted"]),
        (("serve", "engine/candidate", "--store", "store"), ["engine/candidate"]),
        (("history", "../../etc/passwd", "--store", "store"), ["../../etc/passwd"]),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(stiv: Stiv, arguments: tuple[str, ...], said: list[str]) -> None:
    code, _, err = stiv(*arguments)
    assert code == 1
    assert err.startswith("stiv: ") and err.count("\n") == 1 and "Traceback" not in err
    for words in said:
        assert words in err


@pytest.mark.parametrize("content", [None, b"", b"not a video at all" * 100])
def test_ingest_of_an_empty_folder_or_a_corrupt_video_publishes_nothing(
    stiv: Stiv, tmp_path: Path, content: bytes | None
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    if content is not None:
        (videos / "broken.mp4").write_bytes(content)
        facts = {"caption": "a cat", "licence": "CC0", "credit": "me", "source": "cats"}
        (videos / "broken.mp4.json").write_text(json.dumps(facts))
    code, _, err = stiv("ingest", "tiny", "--videos", str(videos), "--store", "store")
    assert code == 1
    assert ("broken.mp4" if content is not None else "videos") in err and err.count("\n") == 1
    assert not open_store("store").list("manifests/") and not open_store("store").list("refs/")
