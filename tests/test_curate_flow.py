"""CurateFlow and the data commands as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.data.shards import ShardSet
from tests.raw_videos import texture, write_sound, write_video

ROOT = Path(__file__).parents[1]
RECIPE = """
items_per_unit = 2
filters = ["motion > 1"]
[origin]
licence = "CC0"
credit = "nobody"
[cut]
short_side = 32
min_scene_len = 5
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write_video(folder / f"{number}.mp4", texture(12, seed=number))
    write_sound(folder / "sound.mp4")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def stiv(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_flow_curates_unit_by_unit_and_shows_its_counts(videos: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    home = {**os.environ, "METAFLOW_USER": "tests", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path), "PATH": path}
    home["PYTHONPATH"] = str(ROOT)
    (tmp_path / ".metaflow").mkdir()
    command = [sys.executable, "-m", "flows.curate_flow", "--no-pylint", "run", "--videos", str(videos)]
    command += ["--recipe", str(videos / "recipe.toml"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w")]
    done = subprocess.run(command, env=home, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 clips of 4 videos" in done.stdout
    assert len(ShardSet(tmp_path / "out")) == 3
    assert len(list((tmp_path / "w").glob("unit-*/set/index.json"))) == 2
    assert list((tmp_path / ".metaflow" / "mf.cards").glob("CurateFlow/runs/*/steps/report/tasks/*/cards/*.html"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_curates_in_processes_and_the_set_can_be_looked_into(videos: Path, tmp_path: Path) -> None:
    done = stiv(
        "curate", videos / "recipe.toml", "--videos", videos, "--out", "set", "--work", "w", "--processes", "2",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 clips" in done.stdout and "no_video" in done.stdout
    assert len(ShardSet(tmp_path / "set")) == 3
