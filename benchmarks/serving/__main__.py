"""Our server against its peers under one load: `python -m benchmarks.serving --peers FOLDER [--quick]`.

It owns the rates, the bound and the figures; `load` says what is asked for, `contestants.serving_peers` what is
compared and what is equal. LitServe is installed beside our environment:

    pip install --no-deps --target runs/peers litserve==0.2.19 pyzmq==27.1.0

Every contestant, in a process of its own, gets the same requests at the same times, under three loads. They are told in
what one video after the other could carry: `overload` is 3 times that, where throughput counts; `steady` is 0.75 of it,
where latency does; `busy` is twice it, near what a server that batches can carry. The bound of a request (its SLO) is
three times what it takes alone on an idle `naive` server.

- `throughput_ratio_to_best_peer`: videos a minute under overload, from the first request until the last video is done,
  to those of the fastest peer.
- `slo_points_gain`: percent of the videos within their bound at the steady load, less that of the best peer.
- `p99_ratio_to_best_peer`: of the steady load's latencies, to the least of the peers'.
  `busy_*` and `overload_*` are the same figures under those loads.
- `cancel_to_free_steps`: engine calls that began after a client sent its DELETE and still held the video. `naive` and
  `litserve` go on to the last step, since nothing tells them.
- `idle_percent`: of the overload's time, in which the engine made no call.
- `predicted_to_measured_*`: the simulator's figure to the measured one, for the policies on our worker.
- `proportional_*`: the same policies on the simulator where a call costs only what its rows cost: what batching gains
  of itself is gone, and what is left is the order.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.contestants.serving_peers import JOB_SERVERS
from benchmarks.result import report
from benchmarks.serving.decision import decision_figures
from benchmarks.serving.drive import Contestant, Seen, cancel_to_free, contestant
from benchmarks.serving.load import Ask, trace
from benchmarks.serving.prediction import predict, prices_of
from infra.serving.scheduling.capacity import percentile
from infra.serving.scheduling.cost import Prices, volume

CONTESTANTS = ("naive", "litserve", "sglang", "vllm_omni", "ours")
PEERS = CONTESTANTS[:-1]
LOADS = {"overload": 3.0, "steady": 0.75, "busy": 2.0}
"""Times the rate at which videos could be made one after the other."""
BOUND = 3.0

Alone = Mapping[tuple[int | bool, ...], float]
"""Seconds of a kind of request on an idle server."""
Run = Mapping[str, Seen]
"""By load."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="folder with litserve and pyzmq")
    parser.add_argument("--quick", action="store_true", help="few requests with few steps; keeps nothing")
    arguments = parser.parse_args()
    quick = bool(arguments.quick)
    asks = trace(8 if quick else 110, seed=1, fewer_steps=5 if quick else 1)
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        figures = measure(asks, Path(scratch), arguments.peers, quick=quick)
    report("serving", figures, quick=quick, peers=("fastapi", "uvicorn", "sqlalchemy"))


def measure(asks: Sequence[Ask], scratch: Path, peers: Path, *, quick: bool) -> dict[str, float]:
    runs: dict[str, Run] = {}
    alone: Alone = {}
    left_over: list[int] = []
    deliveries: Mapping[str, float] = {}
    with ExitStack() as stack:  # few requests are over sooner than five servers start one after the other
        ready = [stack.enter_context(contestant(name, scratch, peers)) for name in CONTESTANTS] if quick else []
        for place, name in enumerate(CONTESTANTS):
            with ExitStack() as own:
                server = ready[place] if quick else own.enter_context(contestant(name, scratch, peers))
                server.wait_until_ready()
                if not alone:
                    alone = times_alone(server, asks)
                runs[name] = run(server, asks, alone)
                if name == "ours":
                    deliveries = server.deliveries()
                    left_over = cancel_to_free(server, videos=4, cancelled=2 if quick else 4)
    bounds = [BOUND * alone[ask.kind] for ask in asks]
    prices = prices_of([seen for name in JOB_SERVERS for seen in runs[name].values()], deliveries)
    call = prices.seconds(min(prices.buckets, key=volume), 2)
    figures = {name: figures_of(run, bounds) for name, run in runs.items()}
    return {
        **gains(figures),
        "cancel_to_free_steps": statistics.mean(left_over),
        **decision_figures(call),
        **{f"{name}_{figure}": value for name, its in figures.items() for figure, value in its.items()},
        **predictions(asks, runs, prices, alone),
    }


def times_alone(server: Contestant, asks: Sequence[Ask]) -> Alone:
    """Seconds of each kind of request on an idle server, after one that does not count."""
    server.alone(asks[0])
    return {kind: server.alone(ask) for kind, ask in {ask.kind: ask for ask in asks}.items()}


def rate_alone(asks: Sequence[Ask], alone: Alone) -> float:
    """Requests a second that are made one after the other."""
    return 1 / statistics.mean(alone[ask.kind] for ask in asks)


def run(server: Contestant, asks: Sequence[Ask], alone: Alone) -> Run:
    rate = rate_alone(asks, alone)
    return {load: server.offer(asks, a_second=times * rate) for load, times in LOADS.items()}


def figures_of(run: Run, bounds: Sequence[float]) -> dict[str, float]:
    overload = run["overload"]
    figures = {"videos_a_minute": 60 * len(bounds) / overload.seconds, "idle_percent": 100 * overload.idle_share}
    for load, seen in run.items():
        prefix = "" if load == "steady" else f"{load}_"
        for percent in (50, 95, 99):
            figures[f"{prefix}p{percent}_seconds"] = percentile(seen.latencies, percent)
        timely = [took <= bound for took, bound in zip(seen.latencies, bounds, strict=True)]
        figures[f"{prefix}slo_percent"] = 100 * statistics.mean(timely)
    return figures


def gains(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Ours to the best peer of each figure."""

    def peers(figure: str) -> list[float]:
        return [figures[name][figure] for name in PEERS]

    ours = figures["ours"]
    gained = {"throughput_ratio_to_best_peer": ours["videos_a_minute"] / max(peers("videos_a_minute"))}
    for prefix in ("", "busy_", "overload_"):
        slo, p99 = f"{prefix}slo_percent", f"{prefix}p99_seconds"
        gained[f"{prefix}slo_points_gain"] = ours[slo] - max(peers(slo))
        gained[f"{prefix}p99_ratio_to_best_peer"] = ours[p99] / min(peers(p99))
    return gained


def predictions(asks: Sequence[Ask], runs: Mapping[str, Run], prices: Prices, alone: Alone) -> dict[str, float]:
    """The simulator's word on all loads, printed beside what was measured; and where calls cost as their rows do."""
    rate, figures = rate_alone(asks, alone), dict[str, float]()
    table = Table("policy", "load", "figure", "predicted", "measured", title="simulator and server")
    for name in JOB_SERVERS:
        for load, seen in runs[name].items():
            told = predict(name, asks, prices, a_second=LOADS[load] * rate)
            pairs = {
                "throughput": (told.videos_a_minute, 60 * len(asks) / seen.seconds),
                "p50": (told.p50_s, percentile(seen.latencies, 50)),
                "p95": (told.p95_s, percentile(seen.latencies, 95)),
            }
            for figure, (predicted, measured) in pairs.items():
                table.add_row(name, load, figure, f"{predicted:.3g}", f"{measured:.3g}")
                figures[f"predicted_to_measured_{name}_{load}_{figure}"] = predicted / measured
    Console().print(table)
    return figures | proportional(asks, prices, rate)


def proportional(asks: Sequence[Ask], prices: Prices, rate: float) -> dict[str, float]:
    """Ours to the better of the two policies, on a simulated engine whose call costs nothing but its rows."""
    rows = {bucket: (0.0, prices.seconds(bucket, 2) / 2) for bucket in prices.buckets}
    told = {
        name: (predict(name, asks, replace(prices, buckets=rows), a_second=LOADS["overload"] * rate))
        for name in JOB_SERVERS
    }
    peers = [told[name] for name in JOB_SERVERS if name != "ours"]
    return {
        "proportional_throughput_ratio": told["ours"].videos_a_minute / max(one.videos_a_minute for one in peers),
        "proportional_p50_ratio": told["ours"].p50_s / min(one.p50_s for one in peers),
        "proportional_p99_ratio": told["ours"].p99_s / min(one.p99_s for one in peers),
    }


if __name__ == "__main__":
    main()
