"""Results: what became of every item and every segment, in counts that add up.

It owns the counts and what each filter removes; it does not know how they are shown.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from infra.curate.answers import Answer
from infra.curate.dsg import Rates
from infra.curate.filters import holds, margins
from infra.curate.staging import Row
from infra.curate.work import Work


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What one filter does."""

    expression: str
    removed: int
    """Segments whose first filter that does not hold is this one."""
    alone: int
    """Segments that it would remove if it were the only one."""
    borderline: tuple[tuple[Row, bool], ...]
    """Segments nearest to its bound, and whether it lets them pass."""


@dataclass(frozen=True, slots=True)
class Results:
    """A curation's outcome."""

    items: Mapping[str, Counter[str]]
    """By state, and within each by reason."""
    segments: Counter[str]
    """By reason; `kept` for what is in the data set."""
    rows: tuple[Row, ...]
    reasons: Mapping[str, str]
    """Of every segment, by key: `kept` or why not."""
    answers: Mapping[str, Answer]

    @classmethod
    def of(cls, work: Work, answers: Mapping[str, Answer]) -> "Results":
        """Raises `ValueError` if a unit is not finished: its segments have no reason and no answer."""
        duplicates = work.duplicates()
        rows = tuple(work.staged(work.units()))
        reasons: dict[str, str] = {}
        for row in rows:
            reason = row.reason or ("duplicate" if row.key in duplicates else "")
            if not reason and row.key not in answers:
                raise ValueError(f"segment {row.key} has no caption yet: run the curation again, it goes on from here")
            reasons[row.key] = reason or answers[row.key].reason or "kept"
        kept = {key: answers[key] for key, reason in reasons.items() if key in answers and reason != "duplicate"}
        return cls(work.item_counts(), Counter(reasons.values()), rows, reasons, kept)

    @property
    def kept(self) -> set[str]:
        return {key for key, reason in self.reasons.items() if reason == "kept"}

    def totals(self) -> dict[str, int]:
        """The sums that must be equal: items = done + dropped + quarantined, segments = kept + dropped."""
        states = {state: sum(reasons.values()) for state, reasons in self.items.items()}
        return {
            "items": sum(states.values()),
            "items_done": states.get("done", 0),
            "items_dropped": states.get("dropped", 0),
            "items_quarantined": states.get("quarantined", 0),
            "segments": len(self.rows),
            "segments_kept": self.segments["kept"],
            "segments_dropped": len(self.rows) - self.segments["kept"],
        }

    def filters(self, expressions: tuple[str, ...], borderline: int = 8) -> list[FilterResult]:
        measured = [row for row in self.rows if row.facts]
        found: list[FilterResult] = []
        for expression in expressions:
            passes = {row.key: holds(expression, row.facts) for row in measured}
            near = sorted(measured, key=lambda row: min(margins(expression, row.facts), default=float("inf")))
            found.append(
                FilterResult(
                    expression,
                    removed=sum(row.reason == expression for row in measured),
                    alone=sum(not passed for passed in passes.values()),
                    borderline=tuple((row, passes[row.key]) for row in near[:borderline]),
                )
            )
        return found

    def rates(self) -> dict[str, Rates]:
        """DSG-Video by captioner, the shape of the paper's Table 8; empty without an audit."""
        audited = [answer for answer in self.answers.values() if answer.audit]
        names = sorted({answer.captioner for answer in audited})
        return {
            name: Rates.of(answer.audit for answer in audited if answer.captioner == name and answer.audit)
            for name in names
        }
