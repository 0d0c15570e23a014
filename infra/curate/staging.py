"""Staging: one unit of work from files to segments that are cut, scored, filtered and encoded.

It owns the order of work on one item, which failure is whose fault, and the staged folder's form; it knows nothing of
captions or of other units. An item's folder appears by one rename, so a killed run leaves none that is half done.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import Field

from infra.curate.cut import Segment, segments
from infra.curate.duplicates import Fingerprint
from infra.curate.filters import holds, names_of
from infra.curate.footage import Footage, moments
from infra.curate.items import About, Item, Unit, fetched
from infra.curate.ledger import Ledger
from infra.curate.recipe import CurationRecipe
from infra.curate.scores.scorer import FACTS, SCORES, facts_of, make_embedding, make_scorers
from infra.store.artifacts import StoreRefused, blob_of
from infra.store.s3_client import S3Access
from model.config import Config
from model.data.scenes import VideoError
from model.data.shard_writer import ShardWriter
from model.data.shards import Sample

logger = logging.getLogger(__name__)

LOOKS = 8
"""JPEGs of a kept segment."""
_JPEG = 88
_JPEG_SIDE = 512
_CAPTION_TO_COME = "(no caption yet)"


class Row(Config):
    """One segment, kept or not."""

    key: str
    item: str
    place: str
    digest: str
    """Sha256 of the file."""
    start_seconds: float
    end_seconds: float
    num_frames: int
    facts: dict[str, float | int | str] = Field(default_factory=dict[str, "float | int | str"])
    """Scores and what else filters may ask for; empty of a segment that is too short to be measured."""
    reason: str = ""
    """Why it is dropped; empty while it is kept."""
    bits: str = ""
    vector: str = ""
    about: About = About()
    colour: str = "000000"
    """Mean of its middle frame: blue, green, red in hex."""


class Staged(Config):
    """`segments.json` of an item."""

    item: Item
    digest: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Stager:
    """Stages the items of one unit below `folder`."""

    recipe: CurationRecipe
    folder: Path
    access: S3Access | None = None
    threads: int | None = None
    """Of the decoder; None leaves it to FFmpeg."""

    def run(self, unit: Unit, on_item: Callable[[str], None] = lambda state: None) -> None:
        """Work until every item is settled; what was settled before is not looked at again.

        Raises:
            OSError: the disk is full or the network away; started again, it goes on.
        """
        ledger = Ledger(self.folder / "ledger.jsonl", self.recipe.limits.attempts)
        check_filters(self.recipe)
        embedding = make_embedding(self.recipe.scores)
        worker = _Worker(self.recipe, make_scorers(self.recipe.scores, embedding), embedding, self.threads)
        left = [item for item in unit.items if not ledger.settled(item.key, item.version)]
        while left:
            for item in left:
                self._try(item, ledger, worker)
                if ledger.settled(item.key, item.version):
                    on_item(ledger.entries[item.key].state)
            left = [item for item in left if not ledger.settled(item.key, item.version)]

    def _try(self, item: Item, ledger: Ledger, worker: "_Worker") -> None:
        ledger.begin(item.key, item.version)
        part = self.folder / "items" / f"{item.key}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            with fetched(item, self.access) as (path, about):
                worker.stage(item, path, about.completed(self.recipe.origin), part)
            shutil.rmtree(part.with_suffix(""), ignore_errors=True)
            part.rename(part.with_suffix(""))
        except VideoError as error:
            ledger.drop(item.key, item.version, error.kind, error.reason)
        except FileNotFoundError as error:
            ledger.drop(item.key, item.version, "missing", str(error))
        except (OSError, StoreRefused, KeyboardInterrupt):
            ledger.withdraw(item.key, item.version)
            raise
        except Exception as error:  # a border: one item's failure must not stop the others
            logger.warning("%s failed", item.place, exc_info=error)
            ledger.fail(item.key, item.version, type(error).__name__, str(error))
        else:
            ledger.done(item.key, item.version)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Worker:
    recipe: CurationRecipe
    scorers: Any
    embedding: Any
    threads: int | None

    def stage(self, item: Item, path: Path, about: About, folder: Path) -> None:
        """Write the item's rows, and its kept segments as a shard set and JPEGs, into `folder`."""
        _require_rights(path, about)
        footage = Footage.of(path, self.recipe.limits)
        fps = footage.fps(self.recipe.cut)
        digest = blob_of(path).digest
        kept = _KeptSegments(folder, self.recipe)
        rows: list[Row] = []
        frames = moments(footage, self.recipe.cut, self.recipe.limits, self.threads)
        try:
            for number, segment in enumerate(segments(frames, fps, self.recipe.cut)):
                row = self._judged(item, digest, number, segment, about)
                if not row.reason:
                    kept.add(row, segment)
                elif row.facts:
                    kept.look(row, segment, 1)
                rows.append(row)
            kept.close()
        except BaseException as error:
            kept.abandon(error)
            raise
        (folder / "segments.json").write_text(Staged(item=item, digest=digest, rows=tuple(rows)).model_dump_json())

    def _judged(self, item: Item, digest: str, number: int, segment: Segment, about: About) -> Row:
        start, end = segment.seconds
        short = end - start < self.recipe.cut.min_seconds - 0.5 / segment.fps
        facts = {} if short else facts_of(segment) | {each.name: each.score(segment) for each in self.scorers}
        failed = next((each for each in self.recipe.filters if facts and not holds(each, facts)), "")
        fingerprint = None if short or failed else Fingerprint.of(segment, self.embedding)
        bits, vector = fingerprint.packed() if fingerprint else ("", "")
        colour = segment.small[len(segment.small) // 2].mean(axis=(0, 1))
        return Row(
            key=f"{item.key}-{number:05d}",
            item=item.key,
            place=item.place,
            digest=digest,
            start_seconds=round(start, 6),
            end_seconds=round(end, 6),
            num_frames=len(segment.frames),
            facts=facts,
            reason="too_short" if short else failed,
            bits=bits,
            vector=vector,
            about=about.model_copy(update={"caption": about.caption_at((start + end) / 2), "scenes": ()}),
            colour="".join(f"{round(float(value)):02x}" for value in colour),
        )


class _KeptSegments:
    """An item's shard set and JPEGs; the set is begun with the first kept segment."""

    def __init__(self, folder: Path, recipe: CurationRecipe) -> None:
        self._folder = folder
        self._writer = ShardWriter(folder / "set", encoding=recipe.encoding)
        self._begun = False

    def add(self, row: Row, segment: Segment) -> None:
        if not self._begun:
            self._writer.__enter__()
            self._begun = True
        self._writer.write(_sample(row, segment))
        self.look(row, segment, LOOKS)

    def look(self, row: Row, segment: Segment, count: int) -> None:
        """Keep so many JPEGs; one, of a segment that a filter drops, is for the report."""
        looks = self._folder / "frames"
        looks.mkdir(exist_ok=True)
        for number, place in enumerate(segment.sampled(count)):
            (looks / f"{row.key}-{number}.jpg").write_bytes(_jpeg(segment, place))

    def close(self) -> None:
        if self._begun:
            self._writer.__exit__(None, None, None)

    def abandon(self, error: BaseException) -> None:
        if self._begun:
            self._writer.__exit__(type(error), error, error.__traceback__)


def check_filters(recipe: CurationRecipe) -> None:
    """Refuse a filter that asks for what no scorer gives, before any video is read."""
    for expression in recipe.filters:
        unknown = names_of(expression) - {*FACTS, *SCORES}
        if unknown:
            raise ValueError(
                f"filter '{expression}' asks for {', '.join(sorted(unknown))}; there are"
                f" {', '.join(sorted({*FACTS, *SCORES}))}"
            )


def _require_rights(path: Path, about: About) -> None:
    missing = [name for name in ("licence", "credit") if getattr(about, name) is None]
    if missing:
        raise VideoError(
            path,
            f"nothing says its {' and '.join(missing)}: write {path.name}.json, or set it in [origin]",
            "no_licence",
        )


def _sample(row: Row, segment: Segment) -> Sample:
    about, height, width = row.about, int(row.facts["height"]), int(row.facts["width"])
    return Sample(
        key=row.key,
        frames=np.stack(segment.frames),
        caption=about.caption or _CAPTION_TO_COME,
        source=about.source or "videos",
        licence=about.licence or "",
        credit=about.credit or "",
        fps=segment.fps,
        original_height=height,
        original_width=width,
    )


def _jpeg(segment: Segment, place: int) -> bytes:
    frame = cv2.cvtColor(segment.frames[place], cv2.COLOR_RGB2BGR)
    scale = min(1.0, _JPEG_SIDE / max(frame.shape[:2]))
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else frame
    done, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _JPEG])
    assert done
    return data.tobytes()
