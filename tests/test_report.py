"""The demo's report is one file that opens offline, says honestly what happened, and escapes what it is given."""

import base64
import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import curves
from flows.catalog import recipe_path
from flows.curves import loss_plot, loss_points
from flows.figures import count, decibel, duration, error, figure, percent
from flows.report import render, write_report
from flows.results import CodecFigures, DemoReport, ParityRow, ServedVideo, SourceSummary, StageResult
from infra.registry.gate import evaluate_gate
from infra.serving.media import write_mp4
from model.config import GateRule
from model.recipe import StageRecipe, load
from model.training.run import ProgressLine
from monitoring.goodput import ACCOUNTS, Account, Booked, Line

VOID = {"meta", "link", "img", "br", "line", "path", "circle"}  # a <rect> has a title, or is closed at once
NASTY = "a <script>alert(1)</script> & \"circle' moves </pre> right"


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.addresses: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            if name in ("src", "href", "poster", "data", "srcset", "action"):
                self.addresses.append((tag, value or ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def media(self, kind: str) -> list[bytes]:
        prefix = f"data:{kind};base64,"
        return [base64.b64decode(address.removeprefix(prefix)) for _, address in self.addresses if prefix in address]


def picture(path: Path, size: tuple[int, int] = (1440, 816)) -> Path:
    """As hard to compress as samples are."""
    noise = np.random.default_rng(0).integers(0, 60, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(path, lossless=True)
    return path


def progress(steps: int, loss: Callable[[int], float] = lambda step: 2.0 / step + 0.3) -> list[ProgressLine]:
    return [
        ProgressLine(
            step=step,
            total_steps=steps,
            loss=loss(step),
            grad_norm=0.5,
            learning_rate=2e-4,
            step_seconds=0.08,
            samples_per_second=400.0,
            elapsed_seconds=0.08 * step,
        )
        for step in range(1, steps + 1)
    ]


def stage_result(recipe: StageRecipe, folder: Path) -> StageResult:
    tasks = ("t2v", "ti2v") if recipe.task == "ti2v" else (recipe.task,)
    metrics = {"heldout_loss": 0.4312}
    for task in tasks:
        metrics |= {f"{task}_color_accuracy": 0.979, f"{task}_shape_accuracy": 0.854}
        if task != "t2i":
            metrics |= {f"{task}_direction_accuracy": 0.896, f"{task}_joint_accuracy": 0.6875}
    if recipe.task == "ti2v":
        metrics["ti2v_first_frame_psnr_db"] = 38.42
    return StageResult(
        recipe=recipe,
        parameters=1834752,
        digest="3fa9c2" + "0b" * 29,
        progress=progress(recipe.training.total_steps),
        metrics=metrics,
        gate=evaluate_gate([GateRule(metric="heldout_loss", op="<", bound=0.8)], metrics),
        grid=picture(folder / f"{recipe.name}.png"),
        animations={task: picture(folder / f"{recipe.name}-{task}.webp", (544, 136)) for task in tasks},
    )


def parity_row(max_abs_error: float = 1.3e-5) -> ParityRow:
    return ParityRow(
        shape="batch 2, 8 frames", max_abs_error=max_abs_error, bound=1e-4, torch_seconds=0.031, onnx_seconds=0.012
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    """A whole, successful run of the tiny recipe; it is frozen, so all tests share it."""
    folder = tmp_path_factory.mktemp("run")
    mp4, first = folder / "video.mp4", picture(folder / "first.png", (32, 32))
    write_mp4(mp4, np.full((8, 32, 32, 3), 90, dtype=np.uint8), 8)
    seen = [("queued", 0.02), ("in_progress", 0.21), ("completed", 4.43)]
    return DemoReport(
        title="STIV demo",
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        hardware="2-core Xeon",
        versions={"torch": "2.13.0"},
        parts=[("ingest", 20.0), ("train", 60.0), ("serve", 20.0)],
        peak_rss_gb=3.482,
        stages=[stage_result(recipe, folder) for recipe in load(recipe_path("tiny")).stages],
        codec=CodecFigures(description="patch PCA", real_psnr_db=29.31, shapes_psnr_db=35.84),
        sources=[
            SourceSummary(
                name="big_buck_bunny",
                train_clips=1038,
                heldout_clips=6,
                licence="CC BY 3.0",
                credit="Blender Foundation",
            )
        ],
        parity=[parity_row(), parity_row(2.14e-5)],
        videos=[
            ServedVideo(
                title=title, prompt=prompt, mp4=mp4, first_frame=image, transitions=seen, facts={"size": "32x32"}
            )
            for title, prompt, image in [("Text to video", "a red circle", None), ("Image to video", NASTY, first)]
        ],
        metrics_excerpt="# HELP stiv_jobs Jobs\nstiv_jobs 2.0\n",
    )


def test_the_page_loads_nothing_from_elsewhere(report: DemoReport) -> None:
    text = render(report)
    page = Page(text)
    outside = [address for _, address in page.addresses if not address.startswith(("data:", "#"))]
    assert not outside and "url(" not in text and "@import" not in text
    assert "script" not in page.tags and "default-src 'none'" in text


def test_every_entry_of_the_contents_leads_somewhere(report: DemoReport) -> None:
    page = Page(render(report))
    anchors = [address[1:] for tag, address in page.addresses if tag == "a"]
    assert len(anchors) == 11 and set(anchors) <= page.ids


def test_videos_and_pictures_are_inside_byte_for_byte(report: DemoReport) -> None:
    page = Page(render(report))
    assert page.media("video/mp4") == [video.mp4.read_bytes() for video in report.videos]
    first = report.videos[1].first_frame
    assert first is not None
    assert page.media("image/png") == [path.read_bytes() for path in (first, *(stage.grid for stage in report.stages))]
    animations = [path for stage in report.stages for path in stage.animations.values()]
    assert page.media("image/webp") == [path.read_bytes() for path in animations]


def test_a_report_of_usual_size_stays_small(report: DemoReport, tmp_path: Path) -> None:
    write_report(report, tmp_path / "out" / "demo-report.html")
    assert 1e6 < (tmp_path / "out" / "demo-report.html").stat().st_size < 6e6


def test_the_upper_part_says_how_it_went(report: DemoReport) -> None:
    text = Page(render(report)).text
    glance = text[text.index("everything worked") : text.index("Each was asked of the running server")]
    tiles = ("1 min 40 s", "3.48 GB", "2.1 \N{MULTIPLICATION SIGN} 10⁻⁵", "38.4\xa0dB", "29.3\xa0dB", "69\xa0%")
    for said in (*tiles, "chance: 2\xa0%", "ingest", "text and image to video"):
        assert said in glance


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: replace(r, parity=[parity_row(), parity_row(2e-4)]), "1 of 2 shapes within their bound"),
        (lambda r: replace(r, parity=[parity_row(math.nan)]), "0 of 1 shapes within their bound"),
        (
            lambda r: replace(r, videos=[replace(r.videos[0], transitions=[("queued", 0.1), ("failed", 2.0)])]),
            "0 of 1 req",
        ),
        (lambda r: replace(r, videos=[replace(r.videos[0], transitions=[])]), "0 of 1 requests completed"),
        (lambda r: replace(r, metrics_excerpt="# HELP only\n"), "0 series"),
        (lambda r: replace(r, stages=[refused(r.stages[0]), *r.stages[1:]]), "2 of 3 stages promoted"),
    ],
)
def test_what_failed_is_said_first(report: DemoReport, change: Callable[[DemoReport], DemoReport], said: str) -> None:
    text = Page(render(change(report))).text
    assert "something failed" in text and "everything worked" not in text and said in text


def refused(stage: StageResult) -> StageResult:
    rules = [GateRule(metric="heldout_loss", op="<", bound=0.1), GateRule(metric="never_measured", op=">", bound=1)]
    return replace(stage, gate=evaluate_gate(rules, stage.metrics))


def test_a_refused_gate_shows_which_rule_did_not_hold(report: DemoReport) -> None:
    text = Page(render(replace(report, stages=[refused(report.stages[0])]))).text
    assert "refused by its gate" in text
    assert re.search(r"heldout_loss\s*0\.4312\s*< 0\.1\s*failed", text)
    assert re.search(r"never_measured\s*\N{EN DASH}\s*> 1\s*failed", text)


def test_words_from_outside_cannot_become_markup(report: DemoReport) -> None:
    source = replace(report.sources[0], name=NASTY, licence=NASTY, credit=NASTY)
    video = replace(report.videos[0], title=NASTY, prompt=NASTY, facts={NASTY: NASTY})
    nasty = replace(
        report,
        title=NASTY,
        hardware=NASTY,
        versions={NASTY: NASTY},
        parts=[(NASTY, 1.0)],
        sources=[source],
        videos=[video],
        metrics_excerpt=NASTY,
        codec=replace(report.codec, description=NASTY),
        parity=[replace(report.parity[0], shape=NASTY)],
    )
    page = Page(render(nasty))
    assert "script" not in page.tags
    assert page.text.count(NASTY) >= 14


def test_figures_nobody_measured_are_dashes(report: DemoReport) -> None:
    text = Page(render(replace(report, stages=[replace(report.stages[0], metrics={"heldout_loss": 0.4})]))).text
    assert "No stage was measured by the checker." in text
    assert "First frame kept\N{EN DASH}PSNR" in text


def test_the_newest_stage_speaks_for_a_metric(report: DemoReport) -> None:
    older, newer = (replace(report.stages[0], metrics={"t2v_joint_accuracy": value}) for value in (0.5, 0.75))
    assert replace(report, stages=[older, newer]).metric("t2v_joint_accuracy") == 0.75
    assert report.metric("not_measured") is None


@pytest.mark.parametrize("part", ["parts", "stages", "sources", "parity", "videos"])
def test_a_report_with_nothing_in_it_is_refused(report: DemoReport, part: str) -> None:
    with pytest.raises(ValueError, match=f"the report's {part} are empty"):
        replace(report, **{part: []})


def test_a_report_that_cannot_be_written_leaves_the_one_before(report: DemoReport, tmp_path: Path) -> None:
    path = tmp_path / "reports" / "demo-report.html"
    write_report(report, path)
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        write_report(replace(report, videos=[replace(report.videos[0], mp4=tmp_path / "missing.mp4")]), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_file_no_browser_shows_is_refused(report: DemoReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clip\.avi cannot go into the report: its ending must be one of"):
        render(replace(report, videos=[replace(report.videos[0], mp4=tmp_path / "clip.avi")]))


def test_bars_follow_one_another_to_the_end(report: DemoReport) -> None:
    bars = re.findall(r'style="left:([\d.]+)%;width:([\d.]+)%"', render(report))
    assert [(float(left), float(width)) for left, width in bars] == [(0, 20), (20, 60), (80, 20)]


def test_a_loss_that_is_not_a_number_is_left_out_of_the_curve() -> None:
    lines = progress(10, lambda step: math.nan if step == 4 else 1.0)
    assert [point.step for point in loss_points(lines)] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert loss_plot(progress(3, lambda _: math.inf)) is None and loss_plot([]) is None


def test_a_run_without_a_loss_is_reported_without_a_curve(report: DemoReport) -> None:
    page = Page(render(replace(report, stages=[replace(report.stages[0], progress=[])])))
    assert "svg" not in page.tags


def test_a_stage_shows_where_its_time_went(report: DemoReport) -> None:
    spent: dict[Account, int] = {"init": 20, "step": 60, "evaluation": 12, "lost_to_restart": 8, "idle": 0}
    booked = Booked()
    booked.add(Line(at=0, elapsed=100 * 10**9, spent={account: value * 10**9 for account, value in spent.items()}))
    stage = replace(report.stages[0], booked=booked)
    text = render(replace(report, stages=[stage]))
    bars = re.findall(r'<rect x="([\d.]+)" width="([\d.]+)" height="4" fill="#\w{6}"><title>([^<]*)</title>', text)
    assert bars == [
        ("0.0", "60.0", "optimizer steps: 1 min 00 s"),
        ("60.0", "20.0", "starting: 20 s"),
        ("80.0", "12.0", "evaluating: 12 s"),
        ("92.0", "8.0", "lost to restarts: 8.0 s"),
    ]
    assert re.search(r"lost to restarts\s+8\.0 s, 8\.0\s%", Page(text).text)


def test_a_stage_that_only_trained_shows_its_last_line(report: DemoReport) -> None:
    last = replace(report.stages[0].progress[-1], spent_seconds={"step": 3.0, "init": 1.0}, mfu=0.412)
    text = Page(render(replace(report, stages=[replace(report.stages[0], progress=[last])]))).text
    assert re.search(r"goodput\s*75\s%", text) and re.search(r"MFU\s*41\s%", text)
    assert re.search(r"optimizer steps\s+3\.0 s, 75\.0\s%", text)


def test_a_stage_nobody_booked_shows_no_bar_and_no_shares(report: DemoReport) -> None:
    text = Page(render(report)).text
    assert "goodput" not in text and "MFU" not in text and "optimizer steps" not in text


def test_every_account_has_words_and_a_colour_of_its_own() -> None:
    assert set(curves.ACCOUNTS) == set(ACCOUNTS)
    assert len(set(curves.ACCOUNTS.values())) == len({color for _, color in curves.ACCOUNTS.values()}) == len(ACCOUNTS)


def test_the_average_of_a_straight_line_is_the_line() -> None:
    points = loss_points(progress(1000, lambda step: 5.0 - 0.001 * step))
    assert all(abs(point.smoothed - point.loss) < 1e-9 for point in points)


def test_a_long_run_is_thinned_from_its_first_to_its_last_step() -> None:
    points = loss_points(progress(5000), limit=100)
    assert len(points) == 100 and (points[0].step, points[-1].step) == (1, 5000)


@pytest.mark.parametrize(("highest", "label"), [(0.62, "0.8"), (1.9, "2"), (2.4, "3"), (9.0, "10"), (0.003, "0.003")])
def test_the_loss_axis_ends_at_a_round_number(highest: float, label: str) -> None:
    plot = loss_plot(progress(5, lambda _: highest))
    assert plot is not None and plot.y_ticks[0].label == "0" and plot.y_ticks[-1].label == label
    assert 3 <= len(plot.y_ticks) <= 6


def test_the_unmasked_phase_is_marked_only_where_there_is_one(report: DemoReport) -> None:
    stage = report.stages[0]
    training = stage.recipe.training.model_copy(update={"steps": 300, "unmasked_steps": 100, "mask_ratio": 0.5})
    marked = replace(stage, recipe=stage.recipe.model_copy(update={"training": training}))
    assert "all tokens from here" in render(replace(report, stages=[marked]))
    training = training.model_copy(update={"unmasked_steps": 0})
    plain = replace(stage, recipe=stage.recipe.model_copy(update={"training": training}))
    assert "all tokens from here" not in render(replace(report, stages=[plain]))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (duration(0.00042), "0.4 ms"),
        (duration(0.042), "42 ms"),
        (duration(0.9996), "1.0 s"),
        (duration(4.25), "4.2 s"),
        (duration(9.97), "10 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(552), "9 min 12 s"),
        (count(1834752), "1,834,752"),
        (error(1.312e-5), "1.3 \N{MULTIPLICATION SIGN} 10⁻⁵"),
        (error(0.0), "0"),
        (error(math.nan), "nan"),
        (figure(0.43125), "0.4313"),
        (figure(1834752.0), "1,834,752"),
        (figure(math.nan), "nan"),
        (figure(None), "\N{EN DASH}"),
        (percent(0.6875), "69\xa0%"),
        (decibel(38.42), "38.4\xa0dB"),
    ],
)
def test_figures_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected
