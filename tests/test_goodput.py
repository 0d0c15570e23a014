"""Every nanosecond of a run is in one account, whatever is killed when; what was done twice counts once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.goodput import (
    ACCOUNTS,
    Account,
    Booked,
    Clock,
    Ledger,
    announce,
    booking,
    process_age,
    read,
    straggler_ratio,
    utilization,
)
from monitoring.stopwatch import Stopwatch

ROOT = Path(__file__).parent.parent
SECOND = 10**9


@dataclass(slots=True)
class Time:
    """A world's clocks; a wall clock may be set, a monotonic one may not."""

    now: int = 1_700_000_000 * SECOND
    wall_is_ahead: int = 0

    def pass_by(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)

    @property
    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, wall=lambda: self.now + self.wall_is_ahead)


def spent(booked: Booked | None) -> dict[str, float]:
    """The accounts that are not empty, in seconds."""
    assert booked is not None and sum(booked.spent.values()) == booked.elapsed
    return {account: seconds for account, seconds in booked.seconds.items() if seconds}


@pytest.fixture
def world() -> Time:
    return Time()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "goodput.jsonl"


def train(ledger: Ledger, world: Time, *, steps: range, saved: tuple[int, ...] = ()) -> None:
    """Steps of 1 s, each after 0.25 s of waiting for its data, a line each; a save takes 2 s."""
    for step in steps:
        ledger.switch("data_wait")
        world.pass_by(0.25)
        ledger.switch("step")
        world.pass_by(1)
        ledger.write(step)
        if step in saved:
            with ledger.book("checkpoint_stall"):
                world.pass_by(2)
            ledger.write(step)


def test_an_undisturbed_run_is_booked_as_it_went(world: Time, path: Path) -> None:
    ledger = Ledger(path, "init", age=3 * SECOND, clock=world.clock)
    world.pass_by(4)
    ledger.resume(0)
    ledger.switch("compile")
    world.pass_by(10)
    train(ledger, world, steps=range(1, 9), saved=(4, 8))
    ledger.close()
    world.pass_by(5)
    controller = Ledger(path, "evaluation", clock=world.clock)
    world.pass_by(6)
    controller.close()
    expected = {"init": 7, "compile": 10, "data_wait": 2, "step": 8, "checkpoint_stall": 4, "evaluation": 6, "idle": 5}
    booked = read(path)
    assert spent(booked) == expected == spent(controller.booked)
    assert booked is not None and booked.goodput == 8 / 42 and booked.restarts == 0


def test_steps_that_are_done_again_are_lost(world: Time, path: Path) -> None:
    killed = Ledger(path, "init", clock=world.clock)
    killed.resume(0)
    train(killed, world, steps=range(1, 8), saved=(4,))
    world.pass_by(0.5)  # into step 8, which no line says anything of
    world.pass_by(20)
    again = Ledger(path, "init", age=8 * SECOND, clock=world.clock)
    world.pass_by(1)
    again.resume(4)
    train(again, world, steps=range(5, 9))
    again.close()
    lost = 3 * 1.25 + 12.5
    expected = {"init": 9, "data_wait": 2, "step": 8, "checkpoint_stall": 2, "lost_to_restart": lost}
    booked = read(path)
    assert spent(booked) == expected
    assert booked is not None and booked.restarts == 1


def test_a_stop_on_request_loses_nothing_and_its_pause_is_idle(world: Time, path: Path) -> None:
    first = Ledger(path, "init", clock=world.clock)
    first.resume(0)
    train(first, world, steps=range(1, 4), saved=(3,))
    first.close()
    world.pass_by(3600)
    second = Ledger(path, "init", age=10 * SECOND, clock=world.clock)
    second.resume(3)
    train(second, world, steps=range(4, 6))
    second.close()
    booked = read(path)
    assert spent(booked) == {"idle": 3590, "init": 10, "step": 5, "data_wait": 1.25, "checkpoint_stall": 2}
    assert booked is not None and booked.restarts == 0


def test_a_run_sent_back_further_loses_more(world: Time, path: Path) -> None:
    for resumed, last in ((0, 8), (6, 9), (2, 3)):
        ledger = Ledger(path, "init", clock=world.clock)
        ledger.resume(resumed)
        train(ledger, world, steps=range(resumed + 1, last + 1))
    booked = read(path)
    assert booked is not None and booked.restarts == 2
    assert spent(booked) == {"step": 3, "data_wait": 0.75, "lost_to_restart": 9 * 1.25}


def test_a_death_before_the_first_step_costs_what_its_start_took(world: Time, path: Path) -> None:
    Ledger(path, "init", clock=world.clock)
    world.pass_by(7)
    Ledger(path, "init", clock=world.clock).close()
    assert spent(read(path)) == {"lost_to_restart": 7}


def test_who_closes_says_what_comes_next(world: Time, path: Path) -> None:
    supervisor = Ledger(path, "init", clock=world.clock)
    world.pass_by(2)
    supervisor.close(then="init")
    world.pass_by(9)  # torchrun starts
    rank = Ledger(path, "init", age=4 * SECOND, clock=world.clock)
    rank.close()
    assert spent(read(path)) == {"init": 11}


@pytest.mark.parametrize("torn", ['{"at": 17', '{"at": 1, "elapsed": 5, "spent": {"step": 5}}'])
def test_a_torn_last_line_is_forgotten(world: Time, path: Path, torn: str) -> None:
    ledger = Ledger(path, "init", clock=world.clock)
    world.pass_by(1)
    ledger.write(0)
    with path.open("a") as file:
        file.write(torn)
    assert spent(read(path)) == {"init": 1}
    world.pass_by(2)
    Ledger(path, "init", clock=world.clock).close()
    assert spent(read(path)) == {"init": 1, "lost_to_restart": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: {**line, "elapsed": line["elapsed"] + 1}, r"line 2 books 1000000000 of 1000000001 ns"),
        (lambda line: {**line, "spent": {"steps": SECOND}}, r"line 2 books to \['steps'\]; accounts are init"),
        (lambda line: {"at": 1}, r"line 2 is no line of a ledger .*move the file away to begin a new one"),
        (lambda line: {**line, "spent": [1]}, "line 2 is no line of a ledger"),
    ],
)
def test_a_line_that_does_not_add_up_is_refused(
    world: Time, path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    ledger = Ledger(path, "init", clock=world.clock)
    world.pass_by(1)
    ledger.close()
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(change(json.loads(lines[1])))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=said):
        read(path)
    with pytest.raises(ValueError, match=said):
        Ledger(path, "init", clock=world.clock)


def test_a_wall_clock_set_back_takes_time_from_nobody(world: Time, path: Path) -> None:
    Ledger(path, "init", clock=world.clock).close()
    world.wall_is_ahead = -3600 * SECOND
    world.pass_by(30)
    second = Ledger(path, "init", age=8 * SECOND, clock=world.clock)
    world.pass_by(5)
    world.wall_is_ahead = -7200 * SECOND  # a monotonic clock does not mind
    world.pass_by(5)
    second.close()
    booked = read(path)
    assert booked is not None and booked.clock_steps_back == 1
    assert spent(booked) == {"init": 10}


def test_a_run_without_a_ledger_has_no_figures(path: Path) -> None:
    assert read(path) is None
    assert Booked().goodput is None


def test_other_ranks_keep_their_accounts_to_themselves(world: Time, tmp_path: Path) -> None:
    ledger = Ledger(None, "init", clock=world.clock)
    ledger.resume(0)
    train(ledger, world, steps=range(1, 3), saved=(2,))
    ledger.close()
    assert ledger.own["step"] == 2 * SECOND and list(tmp_path.iterdir()) == []


def test_an_account_nobody_knows_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="no account 'sleep'; there are init, compile"):
        Ledger(path, "init").switch("sleep")  # pyright: ignore[reportArgumentType]


def test_an_evaluation_that_fails_is_booked_all_the_same(path: Path) -> None:
    with pytest.raises(RuntimeError), booking(path, "evaluation"):
        time.sleep(0.02)
        raise RuntimeError
    found = spent(read(path))
    assert list(found) == ["evaluation"] and found["evaluation"] >= 0.02


def test_ranks_that_are_announced_are_starting_until_they_are_there(path: Path) -> None:
    for _ in range(2):
        announce(path, "init")
        time.sleep(0.02)
        Ledger(path, "step")  # killed at once
    booked = read(path)
    assert booked is not None and booked.restarts == 1
    assert booked.seconds["init"] >= 0.04 and booked.seconds["lost_to_restart"] < 0.02


# What can befall a run: (what, argument). Times are nanoseconds.
SPANS = st.integers(0, 5 * SECOND)
EVENTS = st.one_of(
    st.tuples(st.just("pass"), SPANS),
    st.tuples(st.just("switch"), st.sampled_from(ACCOUNTS)),
    st.tuples(st.just("write"), st.integers(0, 3)),
    st.tuples(st.just("crash"), st.tuples(SPANS, SPANS, st.integers(0, 5), st.binary(max_size=9))),
    st.tuples(st.just("stop"), st.tuples(SPANS, SPANS, st.sampled_from(ACCOUNTS))),
)


@dataclass(slots=True)
class Period:
    """What the test itself knows of a time that was written down."""

    account: Account
    nanoseconds: int
    step: int | None


@settings(max_examples=150, deadline=None)
@given(events=st.lists(EVENTS, max_size=40))
def test_the_accounts_add_up_and_are_right_whatever_happens(
    events: list[tuple[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against a second bookkeeper, who sees the world from outside and may change what it wrote."""
    path, world = tmp_path_factory.mktemp("run") / "goodput.jsonl", Time()
    began, step, deaths = world.now, 0, 0
    account: Account = "init"
    known: list[Period] = []  # written down
    pending: list[Period] = []  # since the last line
    ledger = Ledger(path, "init", clock=world.clock)

    def put_down(at: int | None) -> None:
        known.extend(Period(period.account, period.nanoseconds, at) for period in pending)
        pending.clear()

    def reopen(age: int, gap_account: Account, unwritten: int, down: int, resumed: int) -> Ledger:
        """The next process, which was `age` of the time since the last line already there."""
        age = min(age, unwritten + down)
        known.append(Period("init", age, None))
        known.append(Period(gap_account, unwritten + down - age, None))
        opened = Ledger(path, "init", age=age, clock=world.clock)
        opened.resume(resumed)
        for period in known:
            if period.step is not None and period.step > resumed and period.account in ("step", "data_wait"):
                period.account = "lost_to_restart"
        return opened

    for what, argument in events:
        if what == "pass":
            world.now += argument
            pending.append(Period(account, argument, None))
        elif what == "switch":
            account = argument
            ledger.switch(account)
        elif what == "write":
            step += argument
            ledger.write(step)
            put_down(step)
        elif what == "crash":
            down, age, back, torn = argument
            world.now += down
            with path.open("ab") as file:
                file.write(torn.replace(b"\n", b""))
            step, deaths = max(0, step - back), deaths + 1
            unwritten = sum(period.nanoseconds for period in pending)
            pending.clear()
            account, ledger = "init", reopen(age, "lost_to_restart", unwritten, down, step)
        else:
            down, age, then = argument
            ledger.close(then)
            put_down(None)
            world.now += down
            account, ledger = "init", reopen(age, then, 0, down, step)
    ledger.close()
    put_down(None)

    booked = read(path)
    assert booked is not None
    assert booked.elapsed == world.now - began == sum(booked.spent.values())
    by_hand = {name: sum(p.nanoseconds for p in known if p.account == name) for name in ACCOUNTS}
    assert booked.spent == by_hand == ledger.booked.spent
    assert booked.restarts == deaths and booked.clock_steps_back == 0


@settings(max_examples=60, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.integers(-5 * SECOND, 5 * SECOND), SPANS, st.integers(-5 * SECOND, 5 * SECOND), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_a_wall_clock_that_jumps_neither_makes_time_nor_turns_it_back(
    lives: list[tuple[int, int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, world = tmp_path_factory.mktemp("run") / "goodput.jsonl", Time()
    elapsed, backward, last = 0, 0, None
    for between, alive, during, dies in lives:
        world.wall_is_ahead += between
        wall = world.now + world.wall_is_ahead
        if last is not None:
            elapsed += max(wall - last, 0)
            backward += wall < last
        ledger = Ledger(path, "init", clock=world.clock)
        last = wall
        world.now += alive
        world.wall_is_ahead += during
        if not dies:
            ledger.close()
            elapsed += alive
            last = world.now + world.wall_is_ahead
    booked = read(path)
    assert booked is not None
    assert booked.elapsed == sum(booked.spent.values()) == elapsed
    assert booked.clock_steps_back == backward and min(booked.spent.values()) >= 0


RUN = """
import sys, time
from pathlib import Path
from monitoring.goodput import Ledger, process_age
ledger = Ledger(Path(sys.argv[1]), "init", age=process_age())
ledger.resume(0)
for step in range(1, 10**9):
    ledger.switch("step")
    ledger.write(step)
    print(step, flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_a_ledger_that_adds_up(path: Path) -> None:
    began = time.time_ns()
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        while int(process.stdout.readline()) < 50:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    ledger = Ledger(path, "init")
    ledger.close()
    outside = time.time_ns() - began
    booked = read(path)
    assert booked is not None and sum(booked.spent.values()) == booked.elapsed
    assert booked.restarts == 3
    # A start is known to a hundredth of a second, and the wall clock is no stopwatch.
    assert abs(outside - booked.elapsed) < 0.1 * SECOND + 0.001 * outside


def test_a_process_knows_how_long_it_has_been_there() -> None:
    before = process_age()
    time.sleep(0.05)
    assert 0.04 * SECOND < process_age() - before < 5 * SECOND and before > 0


def test_utilization_is_what_was_done_over_what_could_have_been() -> None:
    # Eight H100 (989 TFLOP/s) that do 4 PFLOP each in 10 s.
    assert utilization(8 * 4e15, 10, 8 * 989e12) == pytest.approx(0.4045, abs=1e-4)


def test_the_straggler_ratio_is_the_slowest_over_the_median() -> None:
    assert straggler_ratio([1.0, 1.0, 1.0]) == 1.0
    assert straggler_ratio([2.0, 1.0, 1.25]) == 1.6


@dataclass(slots=True)
class QueuePoint:
    """As a device's event: where its queue stood when it was recorded, in milliseconds."""

    queue: list[float]
    at: float = 0.0

    def record(self) -> None:
        self.at = sum(self.queue)

    def elapsed_time(self, end_event: Any, /) -> float:
        return float(end_event.at - self.at)


def test_a_stopwatch_counts_its_blocks_alone() -> None:
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.running():
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= stopwatch.take() < 0.1
    assert stopwatch.take() == 0.0


def test_a_stopwatch_with_events_counts_the_devices_time() -> None:
    queue: list[float] = []
    stopwatch = Stopwatch(lambda: QueuePoint(queue))
    for milliseconds in (30.0, 12.0):
        with stopwatch.running():
            queue.append(milliseconds)
        queue.append(500.0)
    assert stopwatch.take() == pytest.approx(0.042)
    assert stopwatch.take() == 0.0
