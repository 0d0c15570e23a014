from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.serving.scheduler import Scheduler


@dataclass
class Row:
    job_id: str
    key: str
    steps_left: int


def admit(scheduler: Scheduler[Row], *rows: tuple[str, str, int]) -> None:
    for job_id, key, steps in rows:
        scheduler.admit(Row(job_id, key, steps))


def batch_ids(scheduler: Scheduler[Row]) -> list[str]:
    return [row.job_id for row in scheduler.next_batch()]


def test_rows_of_one_key_share_a_call_and_unlike_groups_take_turns() -> None:
    scheduler = Scheduler[Row](4)
    admit(scheduler, ("a", "small", 9), ("b", "large", 9), ("c", "small", 9))
    assert [batch_ids(scheduler) for _ in range(4)] == [["a", "c"], ["b"], ["a", "c"], ["b"]]


def test_a_row_joins_the_next_call_of_its_group() -> None:
    scheduler = Scheduler[Row](4)
    admit(scheduler, ("a", "small", 9))
    assert batch_ids(scheduler) == ["a"]
    admit(scheduler, ("b", "small", 9))
    assert batch_ids(scheduler) == ["a", "b"]


def test_a_row_that_left_is_in_no_further_call_and_its_seat_is_free() -> None:
    scheduler = Scheduler[Row](2)
    admit(scheduler, ("a", "small", 9), ("b", "small", 9))
    assert scheduler.free_rows == 0
    scheduler.leave("a")
    assert scheduler.free_rows == 1
    assert batch_ids(scheduler) == ["b"]


def test_a_group_of_newcomers_does_not_push_back_rows_that_wait() -> None:
    scheduler = Scheduler[Row](8)
    admit(scheduler, ("a", "small", 9), ("b", "large", 9))
    served: list[list[str]] = []
    for turn in range(4):
        admit(scheduler, (f"new{turn}", f"shape{turn}", 9))
        served.append(batch_ids(scheduler))
    assert served == [["a"], ["b"], ["new0"], ["a"]]


def test_an_idle_scheduler_has_no_batch() -> None:
    assert Scheduler[Row](1).next_batch() == []


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rows 0"):
        Scheduler[Row](0)
    scheduler = Scheduler[Row](2)
    admit(scheduler, ("a", "small", 1))
    with pytest.raises(ValueError, match="a is running already"):
        admit(scheduler, ("a", "small", 1))
    admit(scheduler, ("b", "small", 1))
    with pytest.raises(ValueError, match="all 2 rows are taken"):
        admit(scheduler, ("c", "small", 1))


jobs_strategy = st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 6)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(jobs=jobs_strategy, max_rows=st.integers(1, 5), cancelled=st.sets(st.integers(0, 19)), data=st.data())
def test_every_job_gets_exactly_its_steps_and_none_starves(
    jobs: list[tuple[str, int]], max_rows: int, cancelled: set[int], data: st.DataObject
) -> None:
    scheduler = Scheduler[Row](max_rows)
    waiting = [Row(str(index), key, steps) for index, (key, steps) in enumerate(jobs)]
    wanted = {row.job_id: row.steps_left for row in waiting}
    done = dict.fromkeys(wanted, 0)
    skipped = dict.fromkeys(wanted, 0)
    while waiting or scheduler.rows:
        while waiting and scheduler.free_rows:
            scheduler.admit(waiting.pop(0))
        for row in scheduler.rows:
            if int(row.job_id) in cancelled and data.draw(st.booleans()):
                scheduler.leave(row.job_id)
        running = scheduler.rows
        batch = scheduler.next_batch()
        assert len(batch) <= len(running) <= max_rows
        assert len({row.key for row in batch}) <= 1
        for row in running:
            skipped[row.job_id] = 0 if row in batch else skipped[row.job_id] + 1
            assert skipped[row.job_id] < max_rows
        for row in batch:
            done[row.job_id] += 1
            row.steps_left -= 1
            if row.steps_left == 0:
                scheduler.leave(row.job_id)
    for job_id, steps in wanted.items():
        assert done[job_id] == steps if int(job_id) not in cancelled else done[job_id] <= steps
