"""All runs, a few at a time, each once: parents before children, what is done already left alone.

It owns the order and the progress that is shown. Killed at any moment it loses at most the runs under way: a run's
result appears by one rename, and whoever starts again goes on from the results that are there.
"""

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.miniature import worker
from benchmarks.miniature.rows import Row
from benchmarks.miniature.runs import RunResult, Workplace, digest_of
from model.training.run import read_progress

POLL_SECONDS = 0.5
TAIL_LINES = 15

Key = tuple[str, int]
"""Row and seed."""


class RunsFailed(RuntimeError):
    """Some runs ended in an error; the others are done as far as they do not grow from these."""


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    bar: TaskID
    began: float


def run_all(
    rows: Mapping[str, Row], seeds: Sequence[int], place: Workplace, *, workers: int, short: bool, console: Console
) -> dict[Key, RunResult]:
    """Every row with every seed; seed after seed, so that an unfinished benchmark has whole tables for some seeds."""
    place.root.mkdir(parents=True, exist_ok=True)
    place.prepare()
    keys = [(row, seed) for seed in seeds for row in rows]
    done = {key: result for key in keys if (result := standing(rows, key, place)) is not None}
    console.print(f"{len(done)} of {len(keys)} runs are done already; {workers} at a time in {place.root}")
    pending = [key for key in keys if key not in done]
    failed: list[Key] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task("runs", total=len(keys), completed=len(done))
        running: dict[Key, _Running] = {}
        try:
            while pending or running:
                for key in _ready(rows, pending, done)[: workers - len(running)]:
                    pending.remove(key)
                    bar = progress.add_task(
                        f"{key[0]} seed {key[1]}", total=rows[key[0]].recipe(0).training.total_steps
                    )
                    running[key] = _Running(worker.start(*key, place, short=short), bar, time.monotonic())
                if not running:
                    break  # what is left grows from runs that failed
                time.sleep(POLL_SECONDS)
                for key in list(running):
                    _follow(key, running[key], place, progress)
                    if running[key].process.poll() is None:
                        continue
                    ended = running.pop(key)
                    progress.remove_task(ended.bar)
                    result = standing(rows, key, place)
                    if ended.process.returncode or result is None:
                        failed.append(key)
                        continue
                    done[key] = result
                    progress.advance(overall)
                    console.print(
                        f"{len(done)}/{len(keys)} {key[0]} seed {key[1]}: {time.monotonic() - ended.began:.0f} s"
                    )
        finally:
            for left in running.values():
                left.process.kill()
                left.process.wait()
    if failed:
        raise RunsFailed(_report(failed, len(pending), place))
    return done


def standing(rows: Mapping[str, Row], key: Key, place: Workplace) -> RunResult | None:
    """The run's result, if it is of the recipes that the rows state now."""
    result = place.result(*key)
    return result if result is not None and result.digest == digest_of(rows, *key) else None


def _ready(rows: Mapping[str, Row], pending: Sequence[Key], done: Mapping[Key, RunResult]) -> list[Key]:
    return [(row, seed) for row, seed in pending if all((parent, seed) in done for parent in rows[row].parents)]


def _follow(key: Key, run: _Running, place: Workplace, progress: Progress) -> None:
    lines = read_progress(place.run(*key) / "progress.jsonl")
    if lines:
        progress.update(run.bar, completed=lines[-1].step)


def _report(failed: Sequence[Key], left: int, place: Workplace) -> str:
    path = worker.log(place, *failed[0])
    tail = "\n".join(path.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    names = ", ".join(f"{row} seed {seed}" for row, seed in failed)
    return f"{len(failed)} runs failed ({names}) and {left} that grow from them were not started; {path} ends:\n{tail}"
