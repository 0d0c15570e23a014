"""Which running rows share the next engine call. Plain Python: it knows nothing of tensors, jobs or databases.

A row joins between two calls, advances one denoise step a call, and leaves after its last or when it is cancelled.
Rows whose keys are equal can share a call; unlike groups take turns.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    @property
    def job_id(self) -> str: ...

    @property
    def key(self) -> Hashable:
        """Equal keys can share an engine call; it may change from step to step."""
        ...


Row = TypeVar("Row", bound=Schedulable)


@dataclass(slots=True)
class _Seat(Generic[Row]):
    row: Row
    last_turn: int


class Scheduler(Generic[Row]):
    """At most `max_rows` rows run; callers admit in the order of arrival as seats get free."""

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} must be at least 1")
        self.max_rows = max_rows
        self._seats: dict[str, _Seat[Row]] = {}
        self._turn = 0

    @property
    def free_rows(self) -> int:
        return self.max_rows - len(self._seats)

    @property
    def rows(self) -> list[Row]:
        return [seat.row for seat in self._seats.values()]

    def admit(self, row: Row) -> None:
        """The row joins the next call of its group; it waits no longer than rows that run already."""
        if self.free_rows == 0:
            raise ValueError(f"all {self.max_rows} rows are taken; admit no more than free_rows")
        if row.job_id in self._seats:
            raise ValueError(f"job {row.job_id} is running already")
        self._seats[row.job_id] = _Seat(row, self._turn)

    def leave(self, job_id: str) -> None:
        """Free the seat of a finished, failed or cancelled row."""
        self._seats.pop(job_id, None)

    def next_batch(self) -> list[Row]:
        """The group of the row that has waited longest, so groups take turns and none starves. Empty when idle."""
        if not self._seats:
            return []
        self._turn += 1
        longest_waiting = min(self._seats.values(), key=lambda seat: seat.last_turn)
        key = longest_waiting.row.key
        batch = [seat for seat in self._seats.values() if seat.row.key == key]
        for seat in batch:
            seat.last_turn = self._turn
        return [seat.row for seat in batch]
