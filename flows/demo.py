"""The demo: the whole chain on this machine, from video files to a served video and a report.

    python -m flows.demo

It owns the order and what it prints; every part is the one that users call, in the same way.
"""

import getpass
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from flows.catalog import recipe_path
from flows.commands.watch import StageDisplay
from flows.demo_client import drive, free_port, wait_ready
from flows.report import write_report
from flows.results import CodecFigures, DemoReport, ParityRow, ServedVideo, SourceSummary, StageResult
from infra.engines.export import ExportedEngine, export_engine
from infra.ingest import Ingested, ingest
from infra.registry.registry import Registry
from infra.store.location import open_store
from model.data.clips import fetch_film
from model.data.shards import ShardSet
from model.recipe import Curriculum, load
from model.training.run import read_progress
from monitoring.memory import PeakMemory

PARTS = {
    "ingest": "ingest real video and moving shapes",
    "train": "train the curriculum: t2i, t2v, ti2v",
    "export": "export to ONNX and prove it equal",
    "serve": "serve two videos to the openai client",
}
FIGURES = (
    *("t2i_shape_accuracy", "t2v_joint_accuracy", "t2v_color_accuracy", "t2v_shape_accuracy", "t2v_direction_accuracy"),
    *("ti2v_joint_accuracy", "ti2v_direction_accuracy", "ti2v_first_frame_psnr_db"),
)
LIBRARIES = ("torch", "deepspeed", "metaflow", "onnxruntime", "openai")
POLL_SECONDS = 0.5


@dataclass(slots=True)
class Demo:
    """Folders, clock and console of one run of the demo."""

    curriculum: Curriculum
    overrides: list[str]
    root: Path
    console: Console
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Part -> wall time."""

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def registry(self) -> Registry:
        return Registry(open_store(str(self.store)))

    @contextmanager
    def part(self, key: str) -> Generator[None]:
        """Say that one of `PARTS` began, and how long it took."""
        self.console.rule(f"[bold]{len(self.seconds) + 1} {PARTS[key]}", align="left")
        began = time.monotonic()
        # Training has its own bars, and a terminal shows one live display at a time.
        with nullcontext() if key == "train" else self.console.status(PARTS[key]):
            yield
        self.seconds[key] = time.monotonic() - began
        self.console.print(f"{PARTS[key]}: {self.seconds[key]:.0f} s")


def main(
    report: Annotated[Path, typer.Option(help="where to write the report")] = Path("demo-report.html"),
    root: Annotated[Path, typer.Option(help="folder of the demo; what it held before is removed")] = Path("runs/demo"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="stage.section.key=value, as in `stiv`")] = None,
) -> None:
    """Ingest, train the tiny curriculum, export, serve, and write a report."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    overrides = overrides or []
    demo = Demo(load(recipe_path("tiny"), overrides), overrides, root.absolute(), Console())
    with PeakMemory() as memory:
        with demo.part("ingest"):
            ingested = _ingest(demo)
        with demo.part("train"):
            stages = _train(demo)
        with demo.part("export"):
            exported = export_engine(demo.registry, "ti2v/promoted", demo.root / "export", who=getpass.getuser())
            demo.console.print(f"largest error against PyTorch: {exported.proof.worst_call.max_abs_error:.1e}")
        with demo.part("serve"):
            videos, metrics = _serve(demo)
        peak = memory.gb
    facts = _report(demo, ingested, stages, exported, (videos, metrics, peak))
    write_report(facts, report)
    _summary(demo, facts)
    demo.console.rule("[bold]done", align="left")
    demo.console.print(f"{facts.seconds_total:.0f} s, peak memory {peak:.1f} GB; report: {report.absolute()}")


def _ingest(demo: Demo) -> Ingested:
    film = fetch_film(demo.root / "videos")
    done = ingest(demo.registry, demo.curriculum, demo.root / "ingest", videos=film.parent, who=getpass.getuser())
    for name, value in sorted(done.codec.metrics.items()):
        demo.console.print(f"  {name} {value:.4g}")
    return done


def _train(demo: Demo) -> list[StageResult]:
    """CurriculumFlow in a process of its own, as a user runs it; its ranks' progress shows as bars."""
    work, log, run_id = demo.root / "work", demo.root / "flow.log", demo.root / "run_id"
    user = os.environ.get("METAFLOW_USER") or os.environ.get("USER") or "demo"
    home = {"METAFLOW_USER": user, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(demo.root)}
    (demo.root / ".metaflow").mkdir()  # cards go to the first one at or above the working folder
    os.environ.update(home)  # Metaflow's client reads them when it is imported, below
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "flows.curriculum_flow", "run", "--recipe", "tiny", "--run-id-file", str(run_id)]
    command += ["--set", ";".join(demo.overrides), "--store", str(demo.store), "--work", str(work)]
    with log.open("wb") as output, StageDisplay(demo.console) as display:
        flow = subprocess.Popen(
            command,
            cwd=demo.root,
            env={**os.environ, "PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        while flow.poll() is None:
            _show(demo, work, display)
            time.sleep(POLL_SECONDS)
        _show(demo, work, display)
    if flow.returncode:
        raise RuntimeError(f"CurriculumFlow ended with exit code {flow.returncode}; the end of {log}:\n{_tail(log)}")
    from metaflow.client.core import Run, namespace

    namespace(None)
    kept = cast(Any, Run(f"CurriculumFlow/{run_id.read_text().strip()}").data)
    return list(cast(dict[str, StageResult], kept.results).values())


def _show(demo: Demo, work: Path, display: StageDisplay) -> None:
    for stage in demo.curriculum.stages:
        for run in work.glob(f"*/{stage.name}"):
            display.show(stage.name, stage.training.total_steps, read_progress(run / "progress.jsonl"))
            if (run / "evaluation" / "samples.png").exists():
                display.finish(stage.name, "evaluated")


def _serve(demo: Demo) -> tuple[list[ServedVideo], str]:
    port, log = free_port(), demo.root / "server.log"
    command = [sys.executable, "-m", "flows.cli", "serve", "engine/candidate", "--port", str(port)]
    command += ["--store", str(demo.store), "--work", str(demo.root / "serving")]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_ready(address, server, log)
            heldout = next((demo.root / "work").glob("*/inputs/*/heldout"))
            return drive(address, demo.curriculum.stage("ti2v"), ShardSet(heldout), demo.root / "videos")
        finally:
            server.terminate()
            server.wait(60)


def _report(
    demo: Demo,
    ingested: Ingested,
    stages: list[StageResult],
    exported: ExportedEngine,
    served: tuple[list[ServedVideo], str, float],
) -> DemoReport:
    videos, metrics, peak = served
    vae, figures = demo.curriculum.stages[0].vae, ingested.codec.metrics
    parity = exported.proof
    return DemoReport(
        title="STIV on one machine",
        created=datetime.now(UTC),
        hardware=f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        parts=[(PARTS[key], seconds) for key, seconds in demo.seconds.items()],
        peak_rss_gb=peak,
        stages=stages,
        codec=CodecFigures(
            description=f"{vae.type}, {vae.latent_channels} channels a {vae.spatial_factor}x{vae.spatial_factor} patch",
            real_psnr_db=figures["psnr_db_big_buck_bunny"],
            shapes_psnr_db=figures["psnr_db_moving_shapes"],
        ),
        sources=_sources(demo.root / "ingest" / "corpus"),
        parity=[
            ParityRow(
                shape=str(row.shape),
                max_abs_error=row.max_abs_error,
                bound=parity.bounds.max_abs_error,
                torch_seconds=row.reference_seconds,
                onnx_seconds=row.candidate_seconds,
            )
            for row in parity.calls
        ],
        videos=videos,
        metrics_excerpt=metrics,
    )


def _sources(corpus: Path) -> list[SourceSummary]:
    train, heldout = ShardSet(corpus / "train"), ShardSet(corpus / "heldout")
    summaries: list[SourceSummary] = []
    for name, totals in train.sources.items():
        first = next(train.sample(place) for place, entry in enumerate(train.entries) if entry.source == name)
        held = heldout.sources.get(name)
        summaries.append(
            SourceSummary(
                name=name,
                train_clips=totals.samples,
                heldout_clips=held.samples if held else 0,
                licence=first.licence,
                credit=first.credit,
            )
        )
    return summaries


def _summary(demo: Demo, report: DemoReport) -> None:
    """The figures as JSON, for benchmarks."""
    figures = {
        "seconds_total": report.seconds_total,
        **{f"seconds_{key}": seconds for key, seconds in demo.seconds.items()},
        "peak_rss_gb": report.peak_rss_gb,
        "onnx_max_abs_error": report.max_abs_error,
        "psnr_db_real_frames": report.codec.real_psnr_db,
        **{name: report.metric(name) for name in FIGURES},
    }
    (demo.root / "summary.json").write_text(json.dumps({"figures": figures}, indent=2))


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
