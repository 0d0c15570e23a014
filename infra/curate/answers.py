"""Answers: captions, categories and audits of a unit's segments, each asked for once.

It owns the file of answers and how many questions are under way; it knows nothing of models or of shards. A line is
written as soon as a segment is answered, so a run that is killed or out of money keeps what was paid for.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.curate.captions.captioner import (
    Captioner,
    OfflineCaptioner,
    VisionCaptioner,
    category_of,
    keeps_original,
)
from infra.curate.captions.endpoint import Bill, Endpoint, Unanswerable
from infra.curate.dsg import Audit, Auditor
from infra.curate.ledger import append_line, read_lines
from infra.curate.recipe import CaptionsConfig, CurationRecipe
from infra.curate.staging import Row
from model.config import Config


class Answer(Config):
    """What is said of one segment."""

    key: str
    captioner: str
    """Who wrote `caption`: a model, `offline`, or `original` for words that came with the video."""
    asked_of: str
    """`Desk.mark` when it was asked for."""
    caption: str = ""
    synthetic: str = ""
    original: str = ""
    category: str = ""
    audit: Audit | None = None
    reason: str = ""
    """Why the segment is dropped; empty where it is kept."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Desk:
    """Whoever answers, put together from a recipe."""

    config: CaptionsConfig
    captioner: Captioner
    vision: Endpoint | None
    language: Endpoint | None
    auditor: Auditor | None
    max_hallucinated: float

    @classmethod
    def of(cls, recipe: CurationRecipe, key: str | None = None, spent: Mapping[str, float] | None = None) -> "Desk":
        """`key` is sent to the recipe's endpoints; `spent` is what each has cost before, by its role."""
        told, spent = recipe.captions, spent or {}
        vision = Endpoint(told.vision, key, spent.get("vision", 0.0)) if told.vision else None
        language = Endpoint(told.language, key, spent.get("language", 0.0)) if told.language else None
        captioner = VisionCaptioner(vision, told.frames, told.prompt) if vision else OfflineCaptioner()
        auditor = (
            Auditor(language, vision, recipe.audit.frames) if recipe.audit.enabled and language and vision else None
        )
        return cls(told, captioner, vision, language, auditor, recipe.audit.max_hallucinated)

    @property
    def at_once(self) -> int:
        return self.config.vision.concurrency if self.config.vision else 1

    def bills(self) -> dict[str, Bill]:
        """By role, of endpoints that were asked."""
        roles = {"vision": self.vision, "language": self.language}
        return {role: asked.bill for role, asked in roles.items() if asked is not None and asked.bill.requests}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for endpoint in (self.vision, self.language):
            if endpoint is not None:
                endpoint.close()

    def mark(self, row: Row) -> str:
        """What an answer depends on: another file under the same name, or another captioner, is asked for anew."""
        return f"{self.captioner.name} of {row.digest[:16]}"

    def answer(self, row: Row, looks: Sequence[bytes]) -> Answer:
        """Caption, category and audit of one segment; a question that has no answer drops it, by name."""
        original = row.about.caption or ""
        told: dict[str, object] = {"key": row.key, "captioner": self.captioner.name, "asked_of": self.mark(row)}
        told["original"] = original
        try:
            if original and keeps_original(row.key, self.config.original_share):
                told |= {"caption": original, "captioner": "original"}
            else:
                caption = self.captioner.caption(row, looks)
                told |= {"caption": caption, "synthetic": "" if caption == original else caption}
            caption = str(told["caption"])
            if self.config.categories and self.language:
                told["category"] = category_of(self.language, caption, self.config.categories)
            if self.auditor:
                audit = self.auditor.audit(caption, looks)
                told["audit"] = audit
                if audit.share > self.max_hallucinated:
                    told |= {"reason": "hallucinated", "detail": ", ".join(audit.hallucinated)}
        except Unanswerable as error:
            told |= {"reason": "unanswerable", "detail": str(error)[:500]}
        return Answer.model_validate(told)


def read_answers(path: Path) -> dict[str, Answer]:
    """The latest of each segment."""
    return {answer.key: answer for answer in map(Answer.model_validate, read_lines(path))}


def answer_all(
    desk: Desk,
    rows: Sequence[Row],
    looks_of: Callable[[Row], Sequence[bytes]],
    path: Path,
    on_answer: Callable[[], None] = lambda: None,
) -> dict[str, Answer]:
    """An answer for every row, those in the file taken as they are.

    Raises:
        ConnectionError: the endpoint is away; `BudgetSpent`: the money is. What was answered is in the file.
    """
    known = read_answers(path)
    answers = {
        row.key: known[row.key] for row in rows if row.key in known and known[row.key].asked_of == desk.mark(row)
    }
    waiting = [row for row in rows if row.key not in answers]

    def work(row: Row) -> Answer:
        return desk.answer(row, looks_of(row))

    with ThreadPoolExecutor(desk.at_once) as pool:
        under_way: set[Future[Answer]] = set()
        failure: BaseException | None = None
        while (waiting and failure is None) or under_way:
            while waiting and failure is None and len(under_way) < 2 * desk.at_once:
                under_way.add(pool.submit(work, waiting.pop(0)))
            finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                error = future.exception()
                failure = failure or error
                if error is None:
                    answer = future.result()
                    append_line(path, answer.model_dump(mode="json"))
                    answers[answer.key] = answer
                    on_answer()
        if failure is not None:
            raise failure
    return answers
