"""The paper in miniature: rows are sound, verdicts follow the rule, runs are done once, the page says what it found."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks.miniature import page, schedule, worker
from benchmarks.miniature.__main__ import figures
from benchmarks.miniature.claims import CRITICAL, Claim, judge, verdict
from benchmarks.miniature.findings import CLAIMS
from benchmarks.miniature.outcome import Outcome, RowOutcome, read_outcomes
from benchmarks.miniature.pictures import samples_picture
from benchmarks.miniature.plot import claims_plot
from benchmarks.miniature.rows import merged
from benchmarks.miniature.runs import RunResult, Workplace, claim_folder, digest_of
from benchmarks.miniature.strong import read_strong
from benchmarks.miniature.table import GROUPS, all_rows, quick
from benchmarks.result import Result, hardware, write

ROWS = all_rows()
CLAIM = Claim(name="c", says="a beats b", paper="Table 0", row="a", than="b", measure="m", higher_is_better=True)


def by_seed(a: list[float], b: list[float]) -> dict[str, dict[int, dict[str, float]]]:
    return {
        "a": {seed: {"m": value} for seed, value in enumerate(a)},
        "b": {seed: {"m": value} for seed, value in enumerate(b)},
    }


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([2.0, 2.1, 1.9], [1.0, 1.0, 1.0], "confirmed"),
        ([1.0, 1.0, 1.0], [2.0, 2.1, 1.9], "contradicted"),
        ([1.0, 2.0, 3.0], [2.0, 1.0, 2.9], "undecided"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "undecided"),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], "confirmed"),
    ],
)
def test_a_verdict_is_the_paired_difference_against_its_spread(a: list[float], b: list[float], expected: str) -> None:
    assert judge(CLAIM, by_seed(a, b)).verdict == expected
    other_way = replace(CLAIM, higher_is_better=False)
    opposite = {"confirmed": "contradicted", "contradicted": "confirmed", "undecided": "undecided"}
    assert judge(other_way, by_seed(a, b)).verdict == opposite[expected]


def test_seeds_are_paired() -> None:
    spread_but_better = by_seed([1.1, 5.12, 9.09], [1.0, 5.0, 9.0])
    finding = judge(CLAIM, spread_but_better)
    assert finding.verdict == "confirmed" and finding.mean == pytest.approx(0.10333, abs=1e-4)
    assert finding.standard_error == pytest.approx(np.std([0.1, 0.12, 0.09], ddof=1) / math.sqrt(3))


def test_a_margin_lets_a_row_be_a_little_worse_and_no_more() -> None:
    free = replace(CLAIM, margin=0.1)
    assert judge(free, by_seed([0.98, 0.97, 0.99], [1.0, 1.0, 1.0])).verdict == "confirmed"
    assert judge(free, by_seed([0.78, 0.77, 0.79], [1.0, 1.0, 1.0])).verdict == "contradicted"


def test_the_bound_is_students_for_the_seeds_there_are() -> None:
    assert verdict(3.0, 2) == "confirmed" and verdict(3.0, 1) == "undecided"
    assert verdict(CRITICAL[9] + 0.01, 40) == "confirmed"
    with pytest.raises(ValueError, match="has 1 seeds in both rows"):
        judge(CLAIM, by_seed([1.0], [2.0]))


def test_a_measure_that_a_row_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="row 'a' has no measure 'psnr'; it has m"):
        judge(replace(CLAIM, measure="psnr"), by_seed([1.0, 1.0], [1.0, 1.0]))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_compares_two_rows_in_a_measure_that_both_have(claim: Claim) -> None:
    task = claim.measure.split("_")[0]
    for name in (claim.row, claim.than):
        recipe = ROWS[name].recipe(0)
        assert task == recipe.task or (task, recipe.task) == ("t2v", "ti2v")
    assert claim.row != claim.than


def test_claims_have_names_of_their_own() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS) >= 12


def test_every_row_is_a_sound_recipe_whose_parents_come_first() -> None:
    seen: set[str] = set()
    for name, row in ROWS.items():
        recipe = row.recipe(7)
        assert recipe.training.seed == 7 and set(row.parents) <= seen
        assert {recipe.parent, recipe.temporal_parent} - {None} <= set(row.parents) | {
            recipe.parent if row.drawn_from else None
        }
        seen.add(name)
    assert [name for rows in GROUPS.values() for name in rows] == list(ROWS)


def test_a_row_that_is_only_drawn_differs_in_sampling_alone() -> None:
    drawn = [row for row in ROWS.values() if row.drawn_from]
    assert len(drawn) >= 6
    for row in drawn:
        own, other = row.recipe(0), ROWS[row.drawn_from or ""].recipe(0)
        assert own.sampling != other.sampling
        assert own.model_copy(update={"sampling": other.sampling}) == other
        assert row.flops == 0.0


@pytest.mark.parametrize("name", ["t2v_scratch", "t2v_from_low", "t2v_joint", "t2v_long", "t2v_long_stride_2"])
def test_rows_of_other_beginnings_cost_what_the_base_costs(name: str) -> None:
    def spent(name: str, counted: set[str]) -> float:
        if name in counted:
            return 0.0
        counted.add(name)
        return ROWS[name].flops + sum(spent(parent, counted) for parent in ROWS[name].parents)

    assert spent(name, set()) == pytest.approx(spent("t2v", set()), rel=0.04)


def test_a_result_stands_for_its_recipe_and_its_parents() -> None:
    base = digest_of(ROWS, "ti2v", 0)
    assert base != digest_of(ROWS, "ti2v", 1) and base != digest_of(ROWS, "ti2v_ca", 0)
    longer = {
        "t2i": replace(ROWS["t2i"], sections=merged(ROWS["t2i"].sections, {"training": {"unmasked_steps": 5000}}))
    }
    assert base != digest_of({**ROWS, **longer}, "ti2v", 0)
    elsewhere = {"t2v_causal": longer["t2i"]}
    assert base == digest_of({**ROWS, **elsewhere}, "ti2v", 0)


def test_what_another_recipe_left_is_removed_and_its_own_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "t2i.0"
    claim_folder(folder, "one")
    (folder / "checkpoints").mkdir()
    claim_folder(folder, "one")
    assert (folder / "checkpoints").exists()
    claim_folder(folder, "two")
    assert not (folder / "checkpoints").exists() and (folder / "digest").read_text() == "two"


@pytest.mark.slow
def test_runs_are_trained_once_and_a_killed_one_again(tmp_path: Path) -> None:
    rows = {name: row for name, row in quick(ROWS).items() if name in ("t2i", "t2i_scale_7_plain")}
    place, console = Workplace(tmp_path), Console(quiet=True)
    place.prepare()
    killed = worker.start("t2i", 0, place, short=True)
    killed.kill()
    killed.wait()
    done = schedule.run_all(rows, [0], place, workers=1, short=True, console=console)
    assert set(done) == {("t2i", 0), ("t2i_scale_7_plain", 0)}
    own, drawn = done["t2i", 0].figures, done["t2i_scale_7_plain", 0].figures
    assert own["heldout_loss"] == drawn["heldout_loss"], "the same weights"
    assert own["t2i_frechet_pixel_motion_8x3"] != drawn["t2i_frechet_pixel_motion_8x3"], "drawn in another way"
    written = (place.run("t2i", 0) / "result.json").stat().st_mtime_ns
    assert schedule.run_all(rows, [0], place, workers=1, short=True, console=console) == done
    assert (place.run("t2i", 0) / "result.json").stat().st_mtime_ns == written
    samples_picture(list(rows.values()), 0, place, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height > 2 * 40


def test_a_failed_run_stops_what_grows_from_it_and_says_why(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    (tmp_path / "prepared").touch()  # and yet there is no corpus
    rows = {name: row for name, row in quick(ROWS).items() if name in ("t2i", "t2v")}
    with pytest.raises(schedule.RunsFailed, match=r"(?s)1 runs failed \(t2i seed 0\) and 1 that grow .* shard set"):
        schedule.run_all(rows, [0], place, workers=2, short=True, console=Console(quiet=True))


def outcome(**changes: object) -> Outcome:
    def row(at: float) -> RowOutcome:
        measures = {claim.measure for claim in CLAIMS} | {"t2i_color_accuracy", "heldout_loss"}
        values = {measure: {seed: at + 0.01 * seed for seed in range(3)} for measure in sorted(measures)}
        return RowOutcome(title="some choice", steps=10, flops=1e12, figures=values)

    rows = {name: row(1.0 + 0.1 * index) for index, name in enumerate(ROWS)}
    fields: dict[str, object] = {
        "hardware": "cpu-2core-xeon",
        "date": datetime(2026, 1, 2, tzinfo=UTC),
        "seeds": (0, 1, 2),
        "cpu_hours": 2.5,
        "rows": rows,
        "strong": {"t2v_joint_accuracy": 0.95},
    }
    return Outcome.model_validate({**fields, **changes})


def test_the_page_says_what_the_committed_outcome_says() -> None:
    outcomes = read_outcomes()
    newest = max(outcomes, key=lambda found: found.date) if outcomes else None
    assert page.PAGE.read_text() == page.page(newest), "run `python -m benchmarks.miniature.page` and commit the page"
    if newest is not None:
        assert (page.IMAGES / "claims.svg").read_text() == claims_plot(newest.findings)
        assert all((page.IMAGES / f"{page.slug(name)}.png").is_file() for name in GROUPS)


def test_the_page_lists_every_claim_and_every_row(tmp_path: Path) -> None:
    found = outcome()
    text = page.page(Outcome.model_validate_json(found.write(tmp_path).read_bytes()))
    assert all(claim.says in text for claim in CLAIMS) and all(f"| `{name}` | some choice" in text for name in ROWS)
    assert "1.01 ± 0.01" in text and "`t2v_joint_accuracy` | 0.9500" in text
    contradicted = [finding.claim.says for finding in found.findings if finding.verdict == "contradicted"]
    assert contradicted and all(f"\n- {says}" in text for says in contradicted)


def test_the_plot_has_a_mark_a_claim() -> None:
    root = ElementTree.fromstring(claims_plot(outcome().findings))
    marks = [node for node in root.iter() if node.tag.endswith("circle") and node.get("r") == "4.5"]
    assert len(marks) == len(CLAIMS)


def test_the_figures_count_the_verdicts() -> None:
    found = figures(outcome())
    assert (
        found["claims_total"]
        == len(CLAIMS)
        == sum(found[f"claims_{word}"] for word in ("confirmed", "undecided", "contradicted"))
    )
    assert found["t2v_joint_accuracy"] == 0.95 and found["rows"] == len(ROWS)


def test_the_strong_figures_are_the_demos_on_this_hardware(tmp_path: Path) -> None:
    measured = {"t2v_joint_accuracy": 0.9, "ti2v_first_frame_psnr_db": 31.0, "ti2v_direction_accuracy": 1.0}
    fields = {"name": "demo", "date": datetime(2026, 1, 2, tzinfo=UTC), "versions": {}, "command": "…"}
    demo = Result.model_validate({**fields, "hardware": hardware(), "figures": {**measured, "seconds_total": 5.0}})
    write(demo.model_copy(update={"hardware": "cpu-64core-other"}), tmp_path)
    with pytest.raises(ValueError, match=f"no result of the demo on {hardware()}"):
        read_strong(tmp_path)
    write(demo, tmp_path)
    assert read_strong(tmp_path) == measured


def test_a_run_leaves_its_result_whole(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    assert place.result("t2i", 0) is None
    place.run("t2i", 0).mkdir()
    (place.run("t2i", 0) / "result.json").write_text(
        json.dumps({"digest": "other", "figures": {"m": 1.0}, "train_seconds": 1.0, "measure_seconds": 1.0})
    )
    assert place.result("t2i", 0) == RunResult("other", {"m": 1.0}, 1.0, 1.0)
    assert schedule.standing(ROWS, ("t2i", 0), place) is None, "of another recipe"
