"""What the simulator predicts of a trace, beside what was measured, for the three policies on our worker.

It owns the comparison: calls are priced by those that were measured, everything else is the simulator's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.contestants.serving_peers import MAX_ROWS
from benchmarks.contestants.serving_policies import EqualKeys, RequestBatches
from benchmarks.serving.drive import Seen
from benchmarks.serving.load import Ask
from infra.serving.limits import VideoRequest, cost_key
from infra.serving.scheduling.capacity import Forecast, judge
from infra.serving.scheduling.cost import CostModel, Prices
from infra.serving.scheduling.scheduler import Scheduler
from infra.serving.scheduling.simulator import Arrival, SimulatedRow, VirtualClock, simulate


def prices_of(seen: Sequence[Seen], deliveries: Mapping[str, float]) -> Prices:
    """Learnt from every call that was made; `deliveries` are what the server itself learnt."""
    cost = CostModel()
    for call in (call for one in seen for call in one.calls):
        cost.observe(call.bucket, call.rows, call.ended - call.began)
    for bucket, seconds in deliveries.items():
        cost.observe_delivery(bucket, seconds)
    return cost.prices


def predict(name: str, asks: Sequence[Ask], prices: Prices, *, a_second: float) -> Forecast:
    """What `name` would make of the trace at that rate."""
    arrivals = [
        Arrival(f"job{ask.seed}", cost_key(ask.request()), ask.steps, ask.rows, ask.at / a_second) for ask in asks
    ]
    asked = {one.job_id: (ask.request(), ask.has_image) for one, ask in zip(arrivals, asks, strict=True)}
    clock = VirtualClock()
    traffic = simulate([_scheduler(name, asked, prices, clock)], arrivals, prices.seconds, clock)
    return judge(arrivals, traffic, prices, dict.fromkeys(asked, 0.0))


def _scheduler(
    name: str, asked: dict[str, tuple[VideoRequest, bool]], prices: Prices, clock: Callable[[], float]
) -> Scheduler[SimulatedRow]:
    def requests(ids: Iterable[str]) -> dict[str, tuple[VideoRequest, bool]]:
        return {job_id: asked[job_id] for job_id in ids}

    if name == "ours":
        return Scheduler[SimulatedRow](MAX_ROWS, CostModel(prices), clock)
    return {"vllm_omni": EqualKeys, "sglang": RequestBatches}[name][SimulatedRow](MAX_ROWS, requests, clock=clock)
