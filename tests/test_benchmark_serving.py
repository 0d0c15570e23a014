"""The serving benchmark compares what it says: the peers' rules, the mix, and figures of the best peer."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.contestants.serving_policies import EqualKeys, RequestBatches
from benchmarks.serving.__main__ import figures_of, gains
from benchmarks.serving.drive import Call, Seen
from benchmarks.serving.load import Ask, trace
from infra.serving.limits import cost_key
from infra.serving.scheduling.cost import Prices
from infra.serving.scheduling.simulator import Arrival, SimulatedRow, Traffic, VirtualClock, simulate

KNOWN = Prices(buckets={"8x32x32": (1.0, 0.1), "8x32x64": (1.0, 0.1)})
PLAIN = Ask(0.0, 32, 32, 8, 4, 3.0, None, False, 0)


def play(policy: type[EqualKeys[SimulatedRow]] | type[RequestBatches[SimulatedRow]], asks: Sequence[Ask]) -> Traffic:
    asked = {f"job{place}": (ask.request(), ask.has_image) for place, ask in enumerate(asks)}
    arrivals = [
        Arrival(f"job{place}", cost_key(ask.request()), ask.steps, ask.rows, 0.01 * place)
        for place, ask in enumerate(asks)
    ]
    scheduler = policy(8, lambda ids: {name: asked[name] for name in ids}, clock=(clock := VirtualClock()))
    return simulate([scheduler], arrivals, KNOWN.seconds, clock)


def test_equal_keys_join_at_a_step_and_the_first_unlike_one_holds_up_all_behind_it() -> None:
    long, unlike = replace(PLAIN, steps=8), replace(PLAIN, guidance_scale=5.0)
    calls = [set(call.job_ids) for call in play(EqualKeys, [PLAIN, long, unlike, PLAIN]).calls]
    assert calls[0] == {"job0"} and calls[1] == {"job0", "job1"}
    assert not any({"job2", "job3"} & set(call) and {"job0", "job1"} & set(call) for call in calls)
    assert calls[-1] == {"job3"}


def test_request_batches_take_equal_ones_from_anywhere_and_nobody_joins_them() -> None:
    image = replace(PLAIN, has_image=True)
    wide = replace(PLAIN, width=64)
    traffic = play(RequestBatches, [wide, PLAIN, image, replace(PLAIN, steps=5), PLAIN, image])
    calls = list(dict.fromkeys(call.job_ids for call in traffic.calls))
    assert calls == [("job0",), ("job1", "job4"), ("job2",), ("job3",), ("job5",)]


def test_a_call_holds_no_more_engine_rows_than_ours() -> None:
    for policy in (EqualKeys[SimulatedRow], RequestBatches[SimulatedRow]):
        traffic = play(policy, [PLAIN] * 9)
        assert max(len(call.job_ids) for call in traffic.calls) == 4
        assert len(traffic.done_at) == 9


def test_the_mix_is_what_its_docstring_says() -> None:
    asks = trace(3000, seed=0)
    assert asks[-1].at == pytest.approx(3000, rel=0.1)
    share = {rows: sum(ask.rows == rows for ask in asks) / 3000 for rows in (1, 2, 3)}
    assert share[1] == pytest.approx(0.10, abs=0.02) and share[3] == pytest.approx(0.10, abs=0.02)
    assert sum(ask.has_image for ask in asks) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert trace(5, seed=1) == trace(5, seed=1) != trace(5, seed=2)
    request, body = asks[0].request(), asks[0].body()
    assert body["size"] == request.size and body["num_inference_steps"] == request.num_inference_steps


def test_gains_are_over_the_best_peer_of_each_figure() -> None:
    def run(seconds: float) -> dict[str, Seen]:
        seen = Seen([seconds, 2 * seconds], [0.0, 0.0], [Call(0.0, seconds, "8x32x32", 2, ("a",))])
        return {"overload": seen, "steady": seen, "busy": seen}

    figures = {name: figures_of(run(seconds), [3.0, 3.0]) for name, seconds in (("naive", 4.0), ("ours", 1.0))}
    figures |= {"litserve": figures_of(run(2.0), [3.0, 3.0]), "sglang": figures["naive"], "vllm_omni": figures["naive"]}
    gained = gains(figures)
    assert figures["ours"]["idle_percent"] == 50.0 and figures["ours"]["videos_a_minute"] == 60.0
    assert gained["throughput_ratio_to_best_peer"] == 2.0
    assert gained["slo_points_gain"] == 50.0
    assert gained["p99_ratio_to_best_peer"] == pytest.approx(0.5)
