"""Where a run's time went: every nanosecond of it in exactly one account, over crashes and restarts.

It owns the ledger, its file `goodput.jsonl` in the run's folder, and the ratios drawn from it. It does not know what a
step is, what is saved or who restarts: whoever begins something says so by `Ledger.switch`, and the account before
ends there. So the accounts add up to the elapsed time exactly, whatever is forgotten.

One process writes at a time. A line covers the time since the line before, whoever wrote that one, and lines are only
ever added; what a death cost is concluded when the file is read, see `Booked`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import psutil

Account = Literal["init", "compile", "data_wait", "step", "checkpoint_stall", "evaluation", "lost_to_restart", "idle"]
ACCOUNTS: tuple[Account, ...] = get_args(Account)
_REPEATED: tuple[Account, ...] = ("step", "data_wait")
"""What a resumed run does once more, and so has lost, of the time after its checkpoint."""


@dataclass(slots=True, frozen=True)
class Clock:
    """Nanoseconds: `monotonic` inside a process, `wall` (since 1970) between processes."""

    monotonic: Callable[[], int] = time.monotonic_ns
    wall: Callable[[], int] = time.time_ns


@dataclass(slots=True, frozen=True)
class Line:
    """One line of `goodput.jsonl`."""

    at: int
    """When it was written, nanoseconds since 1970."""
    elapsed: int
    """Nanoseconds since the line before."""
    spent: Mapping[Account, int]
    """The same nanoseconds by account."""
    step: int | None = None
    """Optimizer steps done by then; None from a process that does none."""
    resumed: int | None = None
    """The run goes on from its state after this many steps; what was done beyond them is done again."""
    then: Account | None = None
    """What the time until the next line is. None: the writer means to go on, and is dead if another one does."""
    restart: bool = False
    """The first line after a writer that died."""
    clock_back: int | None = None
    """By how much the wall clock was behind the line before, where it was; no time was taken to have passed."""


@dataclass(slots=True)
class Booked:
    """The time of a run, all its processes together, in nanoseconds.

    A resumption from step `s` moves the step and data time of every line beyond `s` to `lost_to_restart`; so does the
    time between the last line of a process that died and the next one's first. A line is written with every checkpoint,
    so that none lies across a step from which a run can resume.
    """

    elapsed: int = 0
    spent: dict[Account, int] = field(default_factory=lambda: dict.fromkeys(ACCOUNTS, 0))
    restarts: int = 0
    """Processes that died and were followed by another."""
    clock_steps_back: int = 0
    """How often the wall clock was seen to be behind."""
    _useful: list[tuple[int, dict[Account, int]]] = field(
        default_factory=list[tuple[int, dict[Account, int]]], repr=False
    )
    """Of the lines so far that count: the steps done by then and what a resumption before them would lose."""

    @property
    def goodput(self) -> float | None:
        """The share of the time that went into steps that count; None of a run that has not begun."""
        return self.spent["step"] / self.elapsed if self.elapsed else None

    @property
    def seconds(self) -> dict[str, float]:
        """By account."""
        return {account: nanoseconds / 1e9 for account, nanoseconds in self.spent.items()}

    def add(self, line: Line) -> None:
        self.elapsed += line.elapsed
        for account, nanoseconds in line.spent.items():
            self.spent[account] += nanoseconds
        self.restarts += line.restart
        self.clock_steps_back += line.clock_back is not None
        if line.resumed is not None:
            self._rewind(line.resumed)
        if line.step is not None:
            self._useful.append((line.step, {name: line.spent.get(name, 0) for name in _REPEATED}))

    def _rewind(self, step: int) -> None:
        while self._useful and self._useful[-1][0] > step:
            for account, nanoseconds in self._useful.pop()[1].items():
                self.spent[account] -= nanoseconds
                self.spent["lost_to_restart"] += nanoseconds


class Ledger:
    """One process's hand on a run's ledger; not for several threads.

    Without a path it keeps its accounts to itself, as ranks other than the first do.
    """

    def __init__(self, path: Path | None, account: Account, *, age: int = 0, clock: Clock | None = None) -> None:
        """Open it in `account`.

        Args:
            age: nanoseconds this process has been at it before, see `process_age`.
        """
        self.own: dict[Account, int] = dict.fromkeys(ACCOUNTS, 0)
        """Nanoseconds this process wrote down, the gap before it among them; what it rewound is not taken out."""
        self._clock = clock or Clock()
        self._now = self._clock.monotonic
        self.booked, before = _read(path) if path is not None and path.exists() else (Booked(), None)
        self._file = None if path is None else _open_at_last_line(path)
        self._account: Account = account
        self._spent: dict[Account, int] = dict.fromkeys(ACCOUNTS, 0)
        self._mark = self._written = self._now()
        self._append(self._first_line(before, age))

    def switch(self, account: Account) -> None:
        """What is done from now on. It takes some 0.5 us, `book` 3 us, a line 40 us."""
        if account not in self._spent:
            raise ValueError(f"no account {account!r}; there are {', '.join(ACCOUNTS)}")
        now = self._now()
        self._spent[self._account] += now - self._mark
        self._account, self._mark = account, now

    @contextmanager
    def book(self, account: Account) -> Generator[None]:
        """Book the block to `account`, and what follows it to the account before."""
        before = self._account
        self.switch(account)
        try:
            yield
        finally:
            self.switch(before)

    def write(self, step: int | None = None) -> None:
        """Add a line: what is in no line when the process dies counts as lost.

        Args:
            step: optimizer steps done so far.
        """
        self._append(self._line(step=step))

    def resume(self, step: int) -> None:
        """The run goes on from its state after `step` steps, 0 from its beginning."""
        self._append(self._line(step=step, resumed=step))

    def close(self, then: Account = "idle") -> None:
        """End in good order; the time until the next process opens the ledger is `then`."""
        self._append(self._line(then=then))
        if self._file is not None:
            os.close(self._file)

    def _first_line(self, before: Line | None, age: int) -> Line:
        """What happened since the line before, of which `age` was this process's own start."""
        wall = self._clock.wall()
        if before is None:
            return Line(wall, age, {self._account: age})
        since = wall - before.at
        gap = max(since, 0)
        age = min(age, gap)
        spent = dict.fromkeys((self._account, before.then or "lost_to_restart"), 0)
        spent[self._account] += age
        spent[before.then or "lost_to_restart"] += gap - age
        return Line(wall, gap, spent, restart=before.then is None, clock_back=-since if since < 0 else None)

    def _line(self, step: int | None = None, resumed: int | None = None, then: Account | None = None) -> Line:
        self.switch(self._account)
        spent: dict[Account, int] = {account: value for account, value in self._spent.items() if value}
        line = Line(self._clock.wall(), self._mark - self._written, spent, step, resumed, then)
        self._spent = dict.fromkeys(ACCOUNTS, 0)
        self._written = self._mark
        return line

    def _append(self, line: Line) -> None:
        self.booked.add(line)
        for account, nanoseconds in line.spent.items():
            self.own[account] += nanoseconds
        if self._file is not None:  # one write to a file opened to append: a line is there whole, or torn at the end
            os.write(self._file, _text(line))


@contextmanager
def booking(path: Path, account: Account) -> Generator[None]:
    """Book a block to a run whose ranks are not running, as a controller does with its evaluation; then it is idle."""
    ledger = Ledger(path, account)
    try:
        yield
    finally:
        ledger.close()


def announce(path: Path, account: Account) -> None:
    """Say of a run whose ranks are not running what its time is from now on: `init` where they are being started."""
    Ledger(path, account).close(then=account)


def read(path: Path) -> Booked | None:
    """What has been written down so far, also of a run that goes on; None of a run without a ledger."""
    if not path.exists():
        return None
    booked, _ = _read(path)
    return Booked(booked.elapsed, booked.spent, booked.restarts, booked.clock_steps_back)  # and not each line


def process_age() -> int:
    """Nanoseconds since this process began: its imports have taken seconds before it can open a ledger."""
    if sys.platform == "linux":  # psutil adds this to the time of the boot, which the kernel tells in whole seconds
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0, time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10**9 // os.sysconf("SC_CLK_TCK"))
    return max(0, time.time_ns() - int(psutil.Process().create_time() * 1e9))


def utilization(flops: float, seconds: float, peak_flops: float) -> float:
    """The share of the hardware's peak that was used: MFU of a model's FLOPs, HFU of those with what is recomputed.

    Args:
        peak_flops: a second, of all ranks together.
    """
    return flops / (seconds * peak_flops)


def straggler_ratio(rank_seconds: Sequence[float]) -> float:
    """The slowest rank's own time over the median rank's; 1 is a gang in step."""
    return max(rank_seconds) / median(rank_seconds)


def _read(path: Path) -> tuple[Booked, Line | None]:
    """All whole lines, and the last of them; a line without its end was cut off by a death or is being written."""
    booked, line = Booked(), None
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        line = _parse(text, f"{path} line {number}")
        booked.add(line)
    return booked, line


def _text(line: Line) -> bytes:
    facts = {name: value for name, value in asdict(line).items() if value is not None and value is not False}
    return (json.dumps(facts) + "\n").encode()


def _parse(text: bytes, where: str) -> Line:
    try:
        line = Line(**json.loads(text))
        total = sum(line.spent.values())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no line of a ledger ({error}); move the file away to begin a new one") from error
    if unknown := sorted(set(line.spent) - set(ACCOUNTS)):
        raise ValueError(f"{where} books to {unknown}; accounts are {', '.join(ACCOUNTS)}")
    if total != line.elapsed:
        raise ValueError(f"{where} books {total} of {line.elapsed} ns; move the file away to begin a new one")
    return line


def _open_at_last_line(path: Path) -> int:
    """A descriptor to append by; a torn last line is cut off."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    content = path.read_bytes()
    os.ftruncate(descriptor, content.rfind(b"\n") + 1)
    return descriptor
