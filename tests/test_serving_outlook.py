"""What calls cost, learnt; and when videos will be done, against what the simulator then sees."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.serving.scheduling.cost import CostModel, Prices, volume
from infra.serving.scheduling.order import QueuedJob
from infra.serving.scheduling.outlook import Outlook
from infra.serving.scheduling.scheduler import Scheduler
from infra.serving.scheduling.simulator import Arrival, SimulatedRow, VirtualClock, simulate

SMALL, LARGE = "8x32x32", "16x64x64"
KNOWN = Prices(buckets={SMALL: (1.0, 0.1), LARGE: (1.0, 0.4)}, delivery_megapixel_s=0.0)

waiting_jobs = st.lists(
    st.builds(
        QueuedJob,
        job_id=st.uuids().map(str),
        cost_key=st.sampled_from([SMALL, LARGE]),
        steps_left=st.integers(1, 30),
        rows=st.integers(1, 3),
        created_at=st.just(0.0),
    ),
    min_size=1,
    max_size=15,
    unique_by=lambda one: one.job_id,
)


def outlook() -> Outlook:
    return Scheduler[SimulatedRow](8, CostModel(KNOWN), VirtualClock()).outlook()


def test_the_cost_of_calls_is_learnt_and_carries_to_shapes_that_never_ran() -> None:
    cost = CostModel()
    for turn in range(60):
        rows = 1 + turn % 8
        cost.observe(SMALL, rows, 0.2 + 0.05 * rows)
    assert cost.seconds(SMALL, 4) == pytest.approx(0.4, rel=0.05)
    assert cost.seconds(SMALL, 16) == pytest.approx(1.0, rel=0.1)
    assert cost.seconds(LARGE, 1) == pytest.approx(0.2 + 0.05 * volume(LARGE) / volume(SMALL), rel=0.3)


def test_one_slow_call_does_not_spoil_what_was_learnt_but_a_slower_machine_is_seen() -> None:
    cost = CostModel()
    for _ in range(50):
        cost.observe(SMALL, 2, 0.1)
    cost.observe(SMALL, 2, 60.0)
    assert cost.seconds(SMALL, 2) < 0.12
    for _ in range(400):
        cost.observe(SMALL, 2, 0.3)
    assert cost.seconds(SMALL, 2) == pytest.approx(0.3, rel=0.2)


@settings(max_examples=50, deadline=None)
@given(calls=st.lists(st.tuples(st.integers(1, 16), st.floats(1e-4, 10)), max_size=30))
def test_more_rows_never_cost_less(calls: list[tuple[int, float]]) -> None:
    cost = CostModel()
    for rows, seconds in calls:
        cost.observe(SMALL, rows, seconds)
    costs = [cost.seconds(SMALL, rows) for rows in range(1, 20)]
    assert costs == sorted(costs) and costs[0] > 0


@settings(max_examples=50, deadline=None)
@given(jobs=waiting_jobs)
def test_estimates_are_near_what_comes_and_more_work_makes_no_video_earlier(jobs: list[QueuedJob]) -> None:
    told = outlook().estimates(jobs)
    without_last = outlook().estimates(jobs[:-1])
    assert all(told[name] >= done_at - 1e-9 for name, done_at in without_last.items())
    clock = VirtualClock()
    scheduler = Scheduler[SimulatedRow](8, CostModel(KNOWN), clock)
    arrivals = [Arrival(one.job_id, one.cost_key, one.steps_left, one.rows, 0.0) for one in jobs]
    done = simulate([scheduler], arrivals, KNOWN.seconds, clock).done_at
    assert max(told.values()) == pytest.approx(max(done.values()), rel=0.5)
    assert all(told[one.job_id] >= one.steps_left * KNOWN.seconds(one.cost_key, one.rows) - 1e-9 for one in jobs)


def test_an_outlook_travels_as_json_and_two_replicas_are_faster_than_one() -> None:
    jobs = [QueuedJob(f"job{place}", SMALL, 10, 2, 0.0) for place in range(20)]
    one = outlook()
    read = Outlook.from_json(json.loads(json.dumps(one.to_json())))
    assert read.estimates(jobs) == one.estimates(jobs)
    both = Outlook.merge([one, read])
    new = QueuedJob("new", SMALL, 10, 2, 0.0)
    assert both.estimate(jobs, new).done_at < one.estimate(jobs, new).done_at
    assert one.estimate([], new).done_at == pytest.approx(one.estimate([], new).alone_s)
    assert 0 < one.retry_after(jobs) <= one.retry_after(jobs, places=5)
