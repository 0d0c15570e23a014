"""Metrics keep Prometheus' rules and can be scraped; logs are JSON lines and other ranks are quiet."""

import io
import json
import logging
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from flows.commands import top
from monitoring import logs, metrics, reference

REGISTRIES = {
    "training": metrics.TRAINING,
    "pipeline": metrics.PIPELINE,
    "serving": metrics.SERVING,
    "routing": metrics.ROUTING,
    "probing": metrics.PROBING,
}
CONSTANTS = {name: value for name, value in vars(metrics).items() if isinstance(value, Counter | Gauge | Histogram)}
PUBLIC = sorted(name for name in CONSTANTS if not name.startswith("_"))
UNBOUNDED = {"id", "run_id", "job_id", "request_id", "user", "step", "path", "url", "prompt"}


def exposed_name(constant: str) -> str:
    """A counter loses its `_total` inside the library and gets it back on the page."""
    (family,) = list(CONSTANTS[constant].describe())
    return family.name + ("_total" if family.type == "counter" else "")


def read(registry: CollectorRegistry) -> dict[str, str]:
    """Family name -> type, of a page as a scraper parses it."""
    page, _ = metrics.render(registry)
    return {family.name: family.type for family in text_string_to_metric_families(page.decode())}


@pytest.mark.parametrize("constant", PUBLIC)
def test_a_metric_is_named_by_the_rules(constant: str) -> None:
    name, metric = exposed_name(constant), CONSTANTS[constant]
    assert re.fullmatch(r"stiv(_[a-z]+)+", name)
    assert constant == name.removeprefix("stiv_").upper()
    assert name.endswith("_total") == isinstance(metric, Counter)
    assert not re.search(r"_(ms|millis|minutes|hours|kb|mb|gb|percent)(_|$)", name), "base units only"
    assert not isinstance(metric, Histogram) or name.endswith(("_seconds", "_rows", "_ratio"))


@pytest.mark.parametrize("constant", PUBLIC)
def test_a_metric_has_no_label_that_grows_without_bound(constant: str) -> None:
    labels = set(CONSTANTS[constant]._labelnames)
    assert not labels & UNBOUNDED
    assert "digest" not in labels or constant.endswith("_INFO")


@pytest.mark.parametrize("constant", PUBLIC)
def test_a_metric_says_what_it_is(constant: str) -> None:
    (family,) = list(CONSTANTS[constant].describe())
    assert family.documentation.endswith(".")


def test_each_metric_stands_in_exactly_one_registry() -> None:
    places = [name for registry in REGISTRIES.values() for name in read(registry)]
    assert len(places) == len(set(places)) == len(PUBLIC)


def test_the_longest_step_and_the_longest_job_fall_into_a_finite_bucket() -> None:
    assert max(metrics.TRAINING_STEP_SECONDS._upper_bounds[:-1]) >= 60
    for histogram in (metrics.JOB_SECONDS, metrics.EXPORT_SECONDS, metrics.TRAINING_CHECKPOINT_SECONDS):
        assert max(histogram._upper_bounds[:-1]) >= 1800


def test_the_page_parses_and_holds_what_was_measured() -> None:
    before = metrics.SERVING.get_sample_value("stiv_jobs_total", {"outcome": "completed"}) or 0.0
    metrics.JOBS_TOTAL.labels(outcome="completed").inc()
    metrics.STAGE_SECONDS.labels(stage="encode").observe(0.2)
    page, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }
    assert samples["stiv_jobs_total", (("outcome", "completed"),)] == before + 1
    assert samples["stiv_stage_seconds_count", (("stage", "encode"),)] >= 1
    assert not any(name.endswith("_created") for name, _ in samples)


def test_a_server_shows_no_training_metric_and_a_rank_no_job() -> None:
    assert not [name for name in read(metrics.SERVING) if name.startswith("stiv_training")]
    assert not [name for name in read(metrics.TRAINING) if not name.startswith("stiv_training")]


def test_an_info_metric_has_one_sample_after_it_changed() -> None:
    for digest in ("aaaa", "bbbb"):
        metrics.set_info(metrics.ENGINE_INFO, engine="onnx", stage="ti2v", digest=digest)
    (family,) = list(metrics.ENGINE_INFO.collect())
    assert [(sample.labels["digest"], sample.value) for sample in family.samples] == [("bbbb", 1.0)]


def test_the_exporter_answers_a_scrape_on_the_port_it_names() -> None:
    metrics.TRAINING_LOSS.set(0.25)
    exporter = metrics.start_exporter(0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as answer:
            page = answer.read().decode()
    finally:
        exporter.close()
    assert exporter.port > 0
    assert "\nstiv_training_loss 0.25\n" in page
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=1)


def test_a_port_out_of_range_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="70000 is outside 0 to 65535; 0 takes a free one"):
        metrics.start_exporter(70000)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, given back as it was."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield root
    root.setLevel(level)
    root.handlers[:] = handlers


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_log_line_is_json_with_the_bound_fields(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("INFO", run_id="r1", stage="t2v", rank=0)
    with logs.bound(step=7):
        logging.getLogger("model.training.loop").info("loss is %.2f", 0.5, extra={"micro_batch": 2})
    logging.getLogger("x").info("after")
    first, second = lines(capsys)
    assert str(first.pop("timestamp")).endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "model.training.loop",
        "message": "loss is 0.50",
        "run_id": "r1",
        "stage": "t2v",
        "rank": 0,
        "step": 7,
        "micro_batch": 2,
    }
    assert "step" not in second


def test_other_ranks_say_only_warnings(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", rank=1)
    logging.getLogger("x").info("step done")
    logging.getLogger("x").warning("loss is not finite")
    assert [line["message"] for line in lines(capsys)] == ["loss is not finite"]


def test_configuring_twice_does_not_write_twice(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("INFO", run_id="old")
    logs.configure("INFO", run_id="new")
    logging.getLogger("x").info("once")
    assert [line["run_id"] for line in lines(capsys)] == ["new"]


def test_an_exception_and_odd_characters_stay_on_one_line(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("INFO")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("x").exception("job failed: é\n%s", "\x1b[31m")
    (line,) = lines(capsys)
    assert line["message"] == "job failed: é\n\x1b[31m"
    assert "ValueError: first" in str(line["exception"])


def test_a_field_may_not_hide_the_message(root_logger: logging.Logger) -> None:
    with pytest.raises(ValueError, match=r"log fields \['level'\]"), logs.bound(level="x"):
        pass
    with pytest.raises(ValueError, match=r"log fields \['timestamp'\]"):
        logs.configure("INFO", timestamp="now")


def test_the_reference_page_is_what_the_code_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert page == reference.page(), "run `python -m monitoring.reference > docs/metrics.md`"
    assert page.count("| `stiv_") == len(PUBLIC)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no `promtool` on this machine")
@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_promtool_finds_nothing_wrong_with_a_page(registry: CollectorRegistry) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics.render(registry)[0], capture_output=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr.decode()


def test_top_shows_runs_servers_and_what_cannot_be_reached() -> None:
    metrics.TRAINING_LOSS.set(0.25)
    metrics.TRAINING_STEPS_TOTAL.inc(10)
    metrics.QUEUE_DEPTH.set(3)
    trainer, server = metrics.start_exporter(0), metrics.start_exporter(0, metrics.SERVING)
    console = Console(width=140, record=True, force_terminal=False, file=io.StringIO())
    try:
        urls = [f"http://127.0.0.1:{port}/metrics" for port in (trainer.port, server.port)]
        top.watch([*urls, "http://127.0.0.1:9/metrics"], console, every_s=0.01, rounds=2)
    finally:
        trainer.close()
        server.close()
    shown = console.export_text()
    for words in ("loss", "0.25", "a second)", "waiting, running", "3, 0", "unreachable", "Connection refused"):
        assert words in shown, shown
