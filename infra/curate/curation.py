"""Curation: the steps from a list of videos to a data set, each of which may be run again.

It owns the order of steps and what each takes from the one before; how a step does its work is its module's. One
machine runs the units in processes; a flow runs `stage` and `finish` as tasks. Both call the same functions.
"""

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pydantic import JsonValue

from infra.curate.answers import Answer, Desk, answer_all, read_answers
from infra.curate.duplicates import Fingerprint, find_duplicates
from infra.curate.items import Unit, list_items
from infra.curate.ledger import Ledger
from infra.curate.recipe import CurationRecipe
from infra.curate.report import write_report
from infra.curate.results import Results
from infra.curate.staging import Row, Stager, check_filters
from infra.curate.work import Work, write_whole
from infra.dataset.merge import merge
from infra.store.s3_client import S3Access
from model.config import Config
from model.data.shard_writer import ShardWriter
from model.data.shards import INDEX, ShardSet

OnProgress = Callable[[str, int, int], None]
"""Told the step, how much of it is done and how much there is."""


def _silent(step: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


def curate(
    recipe: CurationRecipe,
    where: str,
    work: Path,
    out: Path,
    *,
    processes: int = 1,
    key: str | None = None,
    on_progress: OnProgress = _silent,
) -> Results:
    """The whole curation on this machine; what was done before in `work` is not done again.

    Raises:
        ValueError: nothing to curate, a recipe that cannot work, or nothing kept at all.
        OSError: a full disk or a lost network; started again, it goes on.
    """
    begun = begin(recipe, where, work)
    _stage_all(begun, processes, on_progress)
    deduplicate(begun)
    units = begun.units()
    for done, unit in enumerate(units, 1):
        finish(begun, unit.number, key)
        on_progress("caption and write", done, len(units))
    return join(begun, out)


def begin(recipe: CurationRecipe, where: str, work: Path, access: S3Access | None = None) -> Work:
    """List what there is to do; a filter or a prompt that cannot work is refused before any video is read."""
    check_filters(recipe)
    return Work.begun(work, recipe, list_items(where, access))


def stage(
    work: Work,
    number: int,
    threads: int | None = None,
    access: S3Access | None = None,
    on_item: Callable[[str], None] = lambda state: None,
) -> None:
    """Cut, score, filter and encode the items of one unit."""
    unit = work.unit(number)
    Stager(work.recipe(), work.folder(unit), access, threads).run(unit, on_item)


def deduplicate(work: Work) -> None:
    """Find what looks alike among all staged segments; the larger picture stays, then the earlier one."""
    rows = [row for row in work.staged(work.units()) if not row.reason]
    rows.sort(key=lambda row: -float(row.facts["short_side"]))  # stable: equal sizes stay in order
    prints = {row.key: Fingerprint.unpacked(row.bits, row.vector) for row in rows}
    work.keep_duplicates(find_duplicates(prints, [row.key for row in rows], work.recipe().duplicates))


def finish(work: Work, number: int, key: str | None = None) -> None:
    """Caption and audit what is left of one unit, and write its shards."""
    unit, recipe = work.unit(number), work.recipe()
    folder = work.folder(unit)
    duplicates = work.duplicates()
    rows = [row for row in work.staged([unit]) if not row.reason and row.key not in duplicates]
    with Desk.of(recipe, key, work.spent()) as desk:
        try:
            answers = answer_all(desk, rows, lambda row: work.looks(unit, row), folder / "answers.jsonl")
        finally:
            work.keep_bills(unit, desk.bills())
    kept = [row for row in rows if not answers[row.key].reason]
    mark = _mark([*kept, *(answers[row.key] for row in kept)])
    target, made_of = folder / "set", folder / "set.sha256"
    if made_of.is_file() and made_of.read_text() == mark:
        return
    shutil.rmtree(target, ignore_errors=True)
    if kept:
        _write_unit(work, unit, kept, answers)
    write_whole(made_of, mark)


def join(work: Work, out: Path) -> Results:
    """One data set of all units' shards at `out`, with its report; ValueError if nothing is left."""
    sets = [work.folder(unit) / "set" for unit in work.units()]
    sets = [folder for folder in sets if (folder / INDEX).exists()]
    results = Results.of(work, {key: each for unit in work.units() for key, each in _answers_of(work, unit).items()})
    if (out / INDEX).exists():
        shards = [shard.sha256 for folder in sets for shard in ShardSet(folder).index.shards]
        if [shard.sha256 for shard in ShardSet(out).index.shards] != shards:
            raise ValueError(f"{out} holds another shard set; write to another folder or delete this one")
    elif sets:
        merge(sets, out)
    write_report(work, results, out)
    if not sets:
        raise ValueError(f"nothing was kept; {out / 'report.html'} says what was dropped and why")
    return results


def _answers_of(work: Work, unit: Unit) -> dict[str, Answer]:
    return read_answers(work.folder(unit) / "answers.jsonl")


def _write_unit(work: Work, unit: Unit, rows: list[Row], answers: dict[str, Answer]) -> None:
    sets: dict[str, tuple[ShardSet, dict[str, int]]] = {}
    with ShardWriter(work.folder(unit) / "set", encoding=work.recipe().encoding) as writer:
        for row in rows:
            if row.item not in sets:
                staged = ShardSet(work.item_folder(unit, row.item) / "set")
                sets = {row.item: (staged, {entry.key: at for at, entry in enumerate(staged.entries)})}
            staged, places = sets[row.item]
            facts, clip = staged.stored(places[row.key])
            writer.write_stored(staged.entries[places[row.key]], facts | _told(row, answers[row.key]), clip)


def _mark(parts: Iterable[Config]) -> str:
    return hashlib.sha256("".join(part.model_dump_json() for part in parts).encode()).hexdigest()


def _told(row: Row, answer: Answer) -> dict[str, JsonValue]:
    """What a sample says of itself beside its clip: caption, where it is from, and what was measured."""
    told: dict[str, JsonValue] = {
        "caption": answer.caption,
        "captioner": answer.captioner,
        "item": row.item,
        "file": row.place,
        "file_sha256": row.digest,
        "start_seconds": row.start_seconds,
        "end_seconds": row.end_seconds,
        "scores": {name: value for name, value in row.facts.items()},
    }
    for name in ("original", "synthetic", "category"):
        if getattr(answer, name):
            told[f"caption_{name}" if name != "category" else name] = getattr(answer, name)
    if row.about.image_caption:
        told["image_caption"] = row.about.image_caption
    if answer.audit:
        told["audit"] = answer.audit.model_dump(mode="json")
    return told


def _stage_all(work: Work, processes: int, on_progress: OnProgress) -> None:
    """All units, in processes of their own; one that an item kills is started again, and the ledger counts."""
    units = work.units()
    total = sum(len(unit.items) for unit in units)
    if processes == 1:
        done = 0
        for unit in units:
            stage(work, unit.number, os.cpu_count())
            done += len(unit.items)
            on_progress("cut and score", done, total)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    waiting = [unit.number for unit in units]
    while waiting:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(stage, work, number, threads): number for number in waiting}
            under_way = set(futures)
            while under_way:
                finished, under_way = wait(under_way, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    if not isinstance(future.exception(), BrokenProcessPool):
                        future.result()
                        waiting.remove(futures[future])
                on_progress("cut and score", _settled(work, units), total)


def _settled(work: Work, units: tuple[Unit, ...]) -> int:
    ledgers = (Ledger(work.folder(unit) / "ledger.jsonl", 1) for unit in units)
    return sum(entry.state in ("done", "dropped", "quarantined") for each in ledgers for entry in each.entries.values())
