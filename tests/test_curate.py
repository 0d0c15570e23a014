"""Raw videos become a data set: real files, whole and broken, one unit at a time, killed and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import boto3  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import pytest

from infra.curate import staging
from infra.curate.curation import begin, curate, deduplicate, finish, join, stage
from infra.curate.items import list_items
from infra.curate.recipe import CurationRecipe, read_recipe
from infra.curate.results import Results
from infra.dataset.statistics import verify
from infra.dataset.table import read_table
from infra.store.s3_client import S3Access
from model.data.shards import ShardSet
from tests.raw_videos import texture, write_bad_corpus, write_sidecar, write_video
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

SMALL = {
    "origin": {"licence": "CC0", "credit": "nobody"},
    "cut": {"short_side": 32, "min_scene_len": 5, "max_seconds": 3.0},
    "filters": ["motion > 1"],
    "items_per_unit": 3,
}


def recipe(**changes: object) -> CurationRecipe:
    return CurationRecipe.model_validate(SMALL | changes)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Six good videos, in two folders, and a corpus of bad ones."""
    folder = tmp_path_factory.mktemp("videos")
    cut = np.concatenate([texture(20, seed=1), texture(25, seed=2)])
    write_video(folder / "cut.mp4", cut)
    write_sidecar(folder / "cut.mp4", caption="two things", scenes=[SCENE])
    write_video(folder / "deep" / "still.mp4", texture(20, seed=3, step=0))
    write_video(folder / "deep" / "again.mp4", cut[:20])
    write_video(folder / "turned.mp4", texture(15, seed=4), rotation=90)
    boxed = texture(15, seed=5)
    boxed[:, :12] = boxed[:, -12:] = 0
    write_video(folder / "boxed.mp4", boxed)
    times = [0, 100, 150, 300, 310, 480, 600, 650, 800, 900, 1050, 1100, 1250, 1400]
    write_video(folder / "variable.mkv", texture(14, seed=6, step=1), times=times)
    return folder, write_bad_corpus(folder / "bad")


SCENE = {"start_seconds": 0.0, "end_seconds": 2.0, "caption": "the first thing"}


@pytest.fixture(scope="module")
def curated(
    videos: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Results]:
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out") / "set"
    return work, out, curate(recipe(), str(videos[0]), work, out)


def test_a_folder_of_videos_becomes_a_sound_set_with_its_words_and_rights(
    curated: tuple[Path, Path, Results],
) -> None:
    _, out, results = curated
    shards = ShardSet(out)
    assert verify(out) == []
    assert {entry.key for entry in shards.entries} == results.kept
    captions = {entry.key: entry.caption for entry in shards.entries}
    first, second = sorted(key for key in captions if key.startswith("cut-"))
    assert (captions[first], captions[second]) == ("the first thing", "two things")
    turned = next(at for at, entry in enumerate(shards.entries) if entry.key.startswith("turned"))
    sample = shards.sample(turned)
    assert sample.frames.shape[1] > sample.frames.shape[2], "filmed upright"
    assert "portrait picture in mostly" in sample.caption, "words for what can be measured"
    facts, _ = shards.stored(turned)
    assert facts["licence"] == "CC0" and len(str(facts["file_sha256"])) == 64
    assert facts["captioner"] == "offline" and isinstance(facts["scores"], dict)


def test_every_bad_file_is_counted_with_its_reason_and_stops_nothing(
    videos: tuple[Path, dict[str, str]], curated: tuple[Path, Path, Results]
) -> None:
    _, _, results = curated
    assert dict(results.items["dropped"]) == dict(Counter(videos[1].values()))
    totals = results.totals()
    assert totals["items"] == 6 + len(videos[1]) == totals["items_done"] + totals["items_dropped"]
    assert totals["segments"] == totals["segments_kept"] + totals["segments_dropped"] == sum(results.segments.values())


def test_stills_and_repeated_scenes_are_dropped_by_name(curated: tuple[Path, Path, Results]) -> None:
    _, out, results = curated
    named = {key.rsplit("-", 2)[0]: reason for key, reason in results.reasons.items() if not key.startswith("cut-")}
    assert named.pop("again") == "duplicate", "the scene that is in two files stays once, in the earlier one"
    assert named.pop("still") == "motion > 1"
    assert set(named.values()) == {"kept"}
    assert results.segments["duplicate"] == 1
    table = {str(row["key"]): row for row in read_table(out / "scores.parquet")}
    assert len(table) == len(results.rows) and {row["outcome"] for row in table.values()} == set(results.segments)
    told = json.loads((out / "statistics.json").read_text())
    assert told["filters"] == [{"expression": "motion > 1", "removed": 1, "alone": 1}]
    page = (out / "report.html").read_text()
    assert "motion &gt; 1" in page and "data:image/jpeg" in page
    assert "CC0" in (out / "README.md").read_text()


def test_letterbox_is_cut_off_and_a_variable_rate_becomes_regular(curated: tuple[Path, Path, Results]) -> None:
    _, _, results = curated
    boxed = next(row for row in results.rows if row.key.startswith("boxed"))
    assert 36 <= int(boxed.facts["height"]) <= 40 and boxed.facts["width"] == 96
    variable = next(row for row in results.rows if row.key.startswith("variable"))
    assert variable.num_frames == pytest.approx(1.5 * float(variable.facts["fps"]), abs=2)


def test_a_second_run_does_nothing_again_and_says_the_same(
    videos: tuple[Path, dict[str, str]], curated: tuple[Path, Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out, results = curated
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.tar")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a settled item was opened again")

    monkeypatch.setattr(staging, "fetched", refuse)
    again = curate(recipe(), str(videos[0]), work, out)
    assert again.totals() == results.totals()
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.tar")} == before
    with pytest.raises(ValueError, match="another recipe"):
        curate(recipe(filters=[]), str(videos[0]), work, out)


def test_a_curation_that_is_killed_in_a_unit_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for number in range(6):
        write_video(folder / f"{number}.mp4", texture(20, seed=100 + number))
    path = tmp_path / "recipe.json"
    path.write_text(recipe(items_per_unit=6).model_dump_json())
    script = (
        "import sys, pathlib as p; from infra.curate.curation import curate;"
        "from infra.curate.recipe import CurationRecipe as R;"
        "curate(R.model_validate_json(p.Path(sys.argv[1]).read_bytes()), sys.argv[2], p.Path(sys.argv[3]),"
        " p.Path(sys.argv[4]))"
    )
    command = [sys.executable, "-c", script, str(path), str(folder), str(tmp_path / "work"), str(tmp_path / "out")]
    first = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    ledger = tmp_path / "work" / "unit-00000" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while not ledger.is_file() or ledger.read_text().count('"done"') < 2:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = ledger.read_text().count('"done"')
    assert done < 6, "it was killed in the middle"
    with ledger.open("a") as torn:
        torn.write('{"key": "to')
    results = curate(recipe(items_per_unit=6), str(folder), tmp_path / "work", tmp_path / "out")
    assert results.totals()["items_done"] == 6
    lines = [line for line in ledger.read_text().splitlines() if '"done"' in line]
    assert len(lines) == 6, "nothing was done twice"
    alone = curate(recipe(items_per_unit=6), str(folder), tmp_path / "work-2", tmp_path / "out-2")
    assert results.totals() == alone.totals()
    found = [[shard.sha256 for shard in ShardSet(tmp_path / out).index.shards] for out in ("out", "out-2")]
    assert found[0] == found[1]


def test_an_item_that_kills_its_process_is_quarantined_after_its_tries(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "poison.mp4", texture(12))
    write_video(tmp_path / "videos" / "sound.mp4", texture(12, seed=9))
    work = begin(recipe(), str(tmp_path / "videos"), tmp_path / "work")
    unit = work.unit(0)
    ledger = work.folder(unit) / "ledger.jsonl"
    ledger.parent.mkdir()
    poison = unit.items[0]
    begun = json.dumps({"key": poison.key, "version": poison.version, "state": "begun"})
    ledger.write_text(f"{begun}\n" * 3)  # what three killed processes leave
    stage(work, 0)
    assert work.item_counts() == {"quarantined": {"killed_its_process": 1}, "done": {"": 1}}


def test_a_full_disk_stops_the_run_and_is_no_items_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "videos" / "one.mp4", texture(15))
    work = begin(recipe(), str(tmp_path / "videos"), tmp_path / "work")

    class FullDisk(staging.ShardWriter):
        def write(self, sample: object) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(staging, "ShardWriter", FullDisk)
        for _ in range(4):  # more often than an item may fail
            with pytest.raises(OSError, match="No space left"):
                stage(work, 0)
    assert not list((tmp_path / "work").rglob("*.tar"))
    stage(work, 0)
    deduplicate(work)
    finish(work, 0)
    assert join(work, tmp_path / "out").totals()["segments_kept"] == 1


def test_a_file_that_changes_is_worked_on_again(tmp_path: Path) -> None:
    path = write_video(tmp_path / "videos" / "one.mp4", texture(15))
    curate(recipe(), str(path.parent), tmp_path / "work", tmp_path / "out")
    write_video(path, texture(25, seed=7))
    shutil.rmtree(tmp_path / "out")
    results = curate(recipe(), str(path.parent), tmp_path / "work", tmp_path / "out")
    assert [entry.num_frames for entry in ShardSet(tmp_path / "out").entries] == [25]
    assert results.totals()["items"] == 1


def test_a_manifest_lists_videos_with_their_words(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", texture(2))
    manifest = tmp_path / "list.jsonl"
    manifest.write_text('{"video": "a.mp4", "caption": "a thing", "licence": "CC BY 4.0"}\n{"video": "gone.mp4"}\n')
    here, gone = list_items(str(manifest))
    assert here.place == str(tmp_path / "a.mp4") and here.about is not None and here.about.caption == "a thing"
    assert gone.version == "missing"
    manifest.write_text('{"video": "a.mp4", "licence": "CC0", "captoin": "x"}\n')
    with pytest.raises(ValueError, match=r"list.jsonl:1: captoin"):
        list_items(str(manifest))
    with pytest.raises(ValueError, match="holds no video"):
        (tmp_path / "empty").mkdir()
        list_items(str(tmp_path / "empty"))


def test_a_recipe_with_a_wrong_key_or_filter_is_refused_before_any_video_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for text, problem in (
        ("[cut]\nthreshhold = 3", "cut.threshhold"),
        ("filters = [\"__import__('os')\"]", "is not allowed"),
        ('filters = ["motion >"]', "no expression"),
        ("[audit]\nenabled = true", "captions.language"),
        ("not toml", "not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            read_recipe(path)
    with pytest.raises(ValueError, match=r"asks for beauty; there are aesthetic"):
        begin(recipe(filters=["beauty > 1"]), str(tmp_path), tmp_path / "work")


def test_videos_under_an_s3_prefix_are_listed_fetched_and_forgotten(s3_server: S3Server, tmp_path: Path) -> None:
    prefix = s3_server.url()
    store = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )
    folder = prefix.partition(s3_server.bucket + "/")[2]
    video = write_video(tmp_path / "one.mp4", texture(15))
    write_sidecar(video, caption="a far thing", licence="CC BY 4.0")
    for path in (video, tmp_path / "one.mp4.json"):
        store.upload_file(str(path), s3_server.bucket, f"{folder}/deep/{path.name}")
    store.close()
    work = begin(recipe(), prefix, tmp_path / "work", s3_server.access)
    assert [item.place for item in work.unit(0).items] == [f"{prefix}/deep/one.mp4"]
    stage(work, 0, access=s3_server.access)
    deduplicate(work)
    finish(work, 0)
    join(work, tmp_path / "out")
    facts, _ = ShardSet(tmp_path / "out").stored(0)
    assert (facts["caption"], facts["licence"]) == ("a far thing", "CC BY 4.0")
    assert facts["file"] == f"{prefix}/deep/one.mp4"
    dead = S3Access("http://127.0.0.1:9", "a", "b", region="us-east-1", timeout=1)
    again = begin(recipe(), prefix, tmp_path / "work-2", s3_server.access)
    with pytest.raises(ConnectionError):
        stage(again, 0, access=dead)
    assert again.item_counts() == {"failed": {"interrupted": 1}}, "a lost network is no item's fault"
    stage(again, 0, access=s3_server.access)
    assert again.item_counts() == {"done": {"": 1}}
