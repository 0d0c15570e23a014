"""The scheduler: memory, order, deadlines, fairness, no starvation; played through the simulator on a virtual clock."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.serving.scheduling.cost import CostModel, Prices
from infra.serving.scheduling.order import Policy, candidate
from infra.serving.scheduling.ranking import Line, in_order, rankings
from infra.serving.scheduling.scheduler import DEFAULT_POLICY, UNBOUNDED, Memory, Scheduler
from infra.serving.scheduling.simulator import Arrival, SimulatedRow, Traffic, VirtualClock, simulate

SMALL, LARGE = "8x32x32", "16x64x64"
CALL_S, ROW_S = 1.0, 0.1
KNOWN = Prices(buckets={SMALL: (CALL_S, ROW_S), LARGE: (CALL_S, 4 * ROW_S)}, delivery_megapixel_s=0.0)


class Flat(CostModel):
    """Knows what calls cost, so that a test can say who is late."""

    def observe(self, cost_key: str, rows: int, seconds: float) -> None:
        pass


def make(
    max_rows: int = 8, *, max_resident: int | None = None, policy: Policy = DEFAULT_POLICY, memory: Memory = UNBOUNDED
) -> tuple[Scheduler[SimulatedRow], VirtualClock]:
    clock = VirtualClock()
    return Scheduler(max_rows, Flat(KNOWN), clock, max_resident=max_resident, memory=memory, policy=policy), clock


def play(
    arrivals: Sequence[Arrival], max_rows: int = 8, *, max_resident: int | None = None, policy: Policy = DEFAULT_POLICY
) -> Traffic:
    scheduler, clock = make(max_rows, max_resident=max_resident, policy=policy)
    return simulate([scheduler], arrivals, KNOWN.seconds, clock)


def job(
    name: str, created_at: float = 0.0, *, steps: int = 10, key: str = SMALL, rows: int = 2, **more: object
) -> Arrival:
    return replace(Arrival(name, key, steps, rows, created_at), **more)  # pyright: ignore[reportArgumentType]


def row(name: str, **more: object) -> SimulatedRow:
    return SimulatedRow.of(job(name, steps=5, **more))  # pyright: ignore[reportArgumentType]


arrivals_strategy = st.lists(
    st.builds(
        Arrival,
        job_id=st.uuids().map(str),
        cost_key=st.sampled_from([SMALL, LARGE, "4x16x16"]),
        steps_left=st.integers(1, 12),
        rows=st.integers(1, 3),
        created_at=st.floats(0, 60),
        client=st.sampled_from(["", "a", "b"]),
        priority=st.integers(-10, 10),
        deadline_at=st.none() | st.floats(0, 200),
        cancelled_at=st.none() | st.floats(0, 100),
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda one: one.job_id,
)


def order_of(traffic: Traffic) -> list[str]:
    return sorted(traffic.done_at, key=lambda name: (traffic.done_at[name], name))


def test_rows_of_one_bucket_share_a_call_whatever_their_guidance_and_steps() -> None:
    traffic = play([job("joint"), job("separate", rows=3, steps=5), job("none", rows=1, steps=3)])
    assert len(traffic.calls) == 10
    assert set(traffic.calls[0].job_ids) == {"joint", "separate", "none"}
    assert traffic.done_at["none"] < traffic.done_at["separate"] < traffic.done_at["joint"]


def test_unlike_buckets_never_share_a_call() -> None:
    traffic = play([job("a"), job("b", key=LARGE), job("c")])
    assert all(len({"b"} & set(call.job_ids)) == 0 or call.job_ids == ("b",) for call in traffic.calls)
    assert set(traffic.done_at) == {"a", "b", "c"}


def test_a_job_joins_at_the_next_call() -> None:
    traffic = play([job("first", steps=20), job("second", created_at=2.5, steps=4)])
    joined = next(index for index, call in enumerate(traffic.calls) if "second" in call.job_ids)
    assert traffic.calls[joined].began_at - 2.5 < KNOWN.seconds(SMALL, 4)
    assert set(traffic.calls[joined].job_ids) == {"first", "second"}


def test_a_cancelled_row_is_in_no_call_after_the_one_that_ran() -> None:
    traffic = play([job("kept", steps=20), job("gone", steps=20, cancelled_at=5.0)])
    assert traffic.cancelled == ["gone"]
    assert all(call.began_at < 5.0 for call in traffic.calls if "gone" in call.job_ids)


def test_an_urgent_deadline_preempts_at_the_next_step_and_the_paused_row_goes_on() -> None:
    long = [job(f"long{place}", steps=50, key=LARGE) for place in range(4)]
    traffic = play([*long, job("urgent", created_at=10.0, steps=5, deadline_at=20.0)])
    assert traffic.done_at["urgent"] <= 20.0
    assert set(traffic.done_at) == {one.job_id for one in long} | {"urgent"}


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    policy = Policy(aging_s=30.0)

    def first(*jobs: Arrival) -> str:
        ranked = rankings([candidate(one, KNOWN, policy) for one in jobs], 20.0)
        return next(in_order([ranked], {"": 0.0}, 1.0)).job_id

    assert first(job("low"), job("high", 29.0, priority=1)) == "high"
    assert first(job("low"), job("high", 31.0, priority=1)) == "low"
    assert first(job("low", priority=-10), job("high", 599.0, priority=10)) == "high"
    traffic = play([job("low"), job("high", 0.5, priority=1, key=LARGE)], max_rows=2, policy=policy)
    assert order_of(traffic) == ["high", "low"]


def test_a_long_video_of_an_idle_server_does_not_hold_up_a_short_one() -> None:
    traffic = play([job("long", steps=100, key=LARGE), job("short", created_at=3.0, steps=5)])
    alone_s = 5 * KNOWN.seconds(SMALL, 2)
    assert traffic.done_at["short"] - 3.0 <= 3 * alone_s


def test_riders_wait_where_they_would_make_another_miss_its_target() -> None:
    tight = job("tight", steps=10, rows=2, deadline_at=10 * KNOWN.seconds(SMALL, 2) + 0.5)
    traffic = play([tight, *(job(f"rider{place}") for place in range(3))])
    assert traffic.done_at["tight"] <= (tight.deadline_at or 0)
    generous = replace(tight, deadline_at=100.0)
    assert len(play([generous, *(job(f"rider{place}") for place in range(3))]).calls) == 10


def test_memory_bounds_rows_of_a_call_and_videos_held() -> None:
    memory = Memory(call_volume=4 * 16 * 64 * 64, resident_volume=3 * 16 * 64 * 64)
    scheduler, clock = make(8, max_resident=6, memory=memory)
    assert (scheduler.rows_of(SMALL), scheduler.rows_of(LARGE)) == (8, 4)
    traffic = simulate([scheduler], [job(f"job{place}", key=LARGE) for place in range(6)], KNOWN.seconds, clock)
    assert max(len(call.job_ids) for call in traffic.calls) == 2
    assert len(traffic.done_at) == 6


def test_only_jobs_of_the_next_call_are_leased_so_that_other_replicas_have_work() -> None:
    scheduler, _ = make(4, max_resident=50)
    waiting = [job(f"job{place}", key=(SMALL, LARGE)[place % 2]) for place in range(20)]
    chosen = scheduler.choose(waiting, 50)
    assert len(chosen) == 2
    assert not set(chosen) & set(scheduler.choose([one for one in waiting if one.job_id not in chosen], 50))


def test_a_queued_job_joins_a_running_row_of_its_bucket_whichever_engine_draws_that() -> None:
    class Drawn(SimulatedRow):
        @property
        def key(self) -> tuple[str, str]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return "digest of the engine", self.cost_key

    scheduler, _ = make(8)
    scheduler.admit(Drawn.of(job("running", steps=9, deadline_at=13.0)))
    assert scheduler.choose([job("other", key=LARGE), job("mate", deadline_at=99.0)], 5) == ["mate"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_line_keeps_the_order_that_sorting_it_anew_would_give(data: st.DataObject) -> None:
    jobs = {one.job_id: one for one in data.draw(arrivals_strategy)}
    line, policy = Line(), Policy()
    lead, now = {client: data.draw(st.floats(0, 20)) for client in ("", "a", "b")}, 0.0
    for _ in range(4):
        now += data.draw(st.floats(0, 100))
        waiting = [jobs[name] for name in data.draw(st.lists(st.sampled_from(sorted(jobs)), unique=True))]
        line.update(waiting, lambda video: candidate(video, KNOWN, policy), now)
        anew = rankings([candidate(one, KNOWN, policy) for one in waiting], now)
        present = {client: lead[client] for client in anew} or lead
        kept = [one.job_id for one in in_order([line.rankings], present, 3.0)]
        assert kept == [one.job_id for one in in_order([anew], present, 3.0)]
        assert sorted(kept) == sorted(one.job_id for one in waiting)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rows 0"):
        make(0)
    scheduler, _ = make(2, max_resident=1)
    with pytest.raises(ValueError, match="takes 3 engine rows of bucket 8x32x32, a call holds 2"):
        scheduler.admit(row("wide", rows=3))
    scheduler.admit(row("a"))
    with pytest.raises(ValueError, match="job a is resident already"):
        scheduler.admit(row("a"))
    with pytest.raises(ValueError, match="all 1 places are taken"):
        scheduler.admit(row("b"))
    assert scheduler.next_batch() and scheduler.free_rows == 0


def test_a_job_that_no_call_can_hold_is_leased_to_be_refused_and_holds_up_nobody() -> None:
    scheduler, _ = make(2)
    assert scheduler.choose([job("wide", rows=3), job("fits", 9.0)], 5) == ["wide"]
    with pytest.raises(ValueError, match="takes 3 engine rows"):
        scheduler.admit(row("wide", rows=3))
    scheduler.leave("wide")
    assert scheduler.choose([job("fits", 9.0)], 5) == ["fits"]


def test_a_row_that_needs_no_engine_row_rides_free() -> None:
    scheduler, _ = make(2)
    scheduler.admit(row("computes"))
    scheduler.admit(row("skips", rows=0))
    batch = scheduler.next_batch()
    assert {row.job_id for row in batch} == {"computes", "skips"}
    scheduler.observe(batch, 1.0)


def test_two_clients_get_equal_shares_however_much_one_asks_for() -> None:
    flood = [job(f"flood{place:02}", client="flood", steps=10) for place in range(60)]
    fair = [job(f"fair{place:02}", client="fair", steps=10) for place in range(15)]
    traffic = play([*flood, *fair], max_rows=4)
    last_fair = max(traffic.done_at[one.job_id] for one in fair)
    seconds = Counter[str]()
    for call in traffic.calls:
        if call.began_at < last_fair:
            for name in call.job_ids:
                seconds[name[:4]] += call.seconds / len(call.job_ids)  # pyright: ignore[reportArgumentType]
    apart_s = seconds["fair"] - seconds["floo"]
    assert 0 <= abs(apart_s) <= 10 * KNOWN.seconds(SMALL, 2) + KNOWN.seconds(SMALL, 4)
    assert seconds["fair"] + seconds["floo"] == pytest.approx(last_fair)


@settings(max_examples=60, deadline=None)
@given(arrivals=arrivals_strategy, max_rows=st.integers(3, 9), max_resident=st.integers(1, 20))
def test_every_job_gets_exactly_its_steps_within_the_limits_and_the_same_way_twice(
    arrivals: list[Arrival], max_rows: int, max_resident: int
) -> None:
    rows = {one.job_id: one for one in arrivals}
    traffic = play(arrivals, max_rows, max_resident=max_resident)
    steps = Counter(name for call in traffic.calls for name in call.job_ids)
    for call in traffic.calls:
        assert 0 < sum(rows[name].rows for name in call.job_ids) <= max_rows
        assert len({rows[name].cost_key for name in call.job_ids}) == 1
        assert len(set(call.job_ids)) == len(call.job_ids)
    for one in arrivals:
        if one.job_id in traffic.done_at:
            assert steps[one.job_id] == one.steps_left
        else:
            assert one.job_id in traffic.cancelled and one.cancelled_at is not None
            assert all(call.began_at < one.cancelled_at for call in traffic.calls if one.job_id in call.job_ids)
    assert play(arrivals, max_rows, max_resident=max_resident).calls == traffic.calls


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(0.5, 4.0),
    victim_steps=st.integers(1, 20),
    key=st.sampled_from([SMALL, LARGE]),
    seed=st.integers(0, 99),
)
def test_no_job_starves_under_endless_overload_by_more_urgent_ones(
    rate: float, victim_steps: int, key: str, seed: int
) -> None:
    """The oldest late job has its share of the engine: steps x longest call / share, after it became late."""
    policy = Policy(late_share=0.4, target_stretch=1.0)
    flood = [job(f"flood{place}", place / rate, steps=4, rows=2) for place in range(80)]
    victim = job("victim", 0.01 * seed, steps=victim_steps, key=key, rows=3)
    traffic = play([*flood, victim], max_rows=4, policy=policy)
    older_s = sum(one.steps_left for one in flood if one.created_at <= victim.created_at) * KNOWN.seconds(SMALL, 4)
    bound_s = (older_s + victim.steps_left * KNOWN.seconds(key, 4)) / policy.late_share
    assert traffic.done_at["victim"] - victim.created_at <= bound_s + 3 * KNOWN.seconds(LARGE, 4)


@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 6), st.floats(0, 30), st.floats(1, 80)), min_size=1, max_size=8),
)
def test_deadlines_that_earliest_deadline_first_can_meet_are_met(jobs: list[tuple[int, float, float]]) -> None:
    """One row a call, so the engine is one machine, on which preemptive earliest-deadline-first is optimal."""
    call_s = KNOWN.seconds(SMALL, 1)
    arrivals = [
        job(f"job{place}", created, steps=steps, rows=1, deadline_at=created + slack + (steps + 1) * call_s)
        for place, (steps, created, slack) in enumerate(jobs)
    ]
    if not earliest_deadline_first_meets_all(arrivals, call_s):
        return
    traffic = play(arrivals, max_rows=1, max_resident=8)
    assert all(traffic.done_at[one.job_id] <= (one.deadline_at or 0) + 1e-6 for one in arrivals)


def earliest_deadline_first_meets_all(arrivals: Sequence[Arrival], call_s: float) -> bool:
    """By an independent walk, with a call to spare for what had begun when a job came."""
    left = {one.job_id: one.steps_left for one in arrivals}
    known = {one.job_id: one for one in arrivals}
    now = 0.0
    while left:
        ready = [known[name] for name in left if known[name].created_at <= now]
        if not ready:
            now = min(known[name].created_at for name in left)
            continue
        first = min(ready, key=lambda one: one.deadline_at or 0)
        now += call_s
        left[first.job_id] -= 1
        if left[first.job_id] == 0:
            del left[first.job_id]
            if now > (first.deadline_at or 0):
                return False
    return True


def test_hours_of_traffic_take_seconds() -> None:
    arrivals = [job(f"job{place:04}", 25.0 * place, steps=20, key=(SMALL, LARGE)[place % 2]) for place in range(500)]
    traffic = play(arrivals)
    assert len(traffic.done_at) == 500
    assert max(traffic.done_at.values()) > 3 * 3600
