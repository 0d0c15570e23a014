"""What a decision of the scheduler costs, beside what a denoise call costs.

It owns the clock around one scheduler in plain Python, and the paper's XL call counted from its shape; it runs no
network. A decision is what comes between two calls: the next batch, and the observation of the last one. Choosing from
the queue is beside it, in another thread, whenever a job comes or a place is free.
"""

import random
import time
import timeit

from benchmarks.serving.load import SHAPES, STEPS
from infra.serving.scheduling.cost import CostModel, Prices
from infra.serving.scheduling.scheduler import Scheduler
from infra.serving.scheduling.simulator import Arrival, SimulatedRow
from model.config import NetworkConfig
from model.network.flops import forward_flops
from model.planning.gpu import GPUS

QUEUED, RESIDENT, MAX_ROWS = 1000, 64, 16
XL = NetworkConfig(hidden_size=1152, depth=28, num_heads=18, temporal_patch_size=2)
XL_LATENTS = 20, 8, 32, 32
"""Frames, channels, height and width: 20 frames of 256x256, the smallest video of the paper's XL."""
XL_TEXT = 77
REACHED = 0.5
"""Of the card's peak in bfloat16: more than anyone reaches, so the call is rather too short."""


def decision_figures(tiny_call_s: float) -> dict[str, float]:
    """Microseconds with 1,000 jobs queued and 64 videos resident, and their share of a call."""
    figures: dict[str, float] = {}
    for suffix, clients in (("", 1), ("_ten_clients", 10)):
        decision, choice = decision_seconds(clients)
        figures |= {f"decision_microseconds{suffix}": 1e6 * decision, f"choice_microseconds{suffix}": 1e6 * choice}
    decision = figures["decision_microseconds"] / 1e6
    return figures | {
        "tiny_call_milliseconds": 1e3 * tiny_call_s,
        "decision_percent_of_tiny_call": 100 * decision / tiny_call_s,
        "xl_call_milliseconds_on_paper": 1e3 * xl_call_seconds(rows=2),
        "decision_percent_of_xl_call": 100 * decision / xl_call_seconds(rows=2),
    }


def decision_seconds(clients: int) -> tuple[float, float]:
    """Of one decision, and of one choice from the queue: the best of many, as other processes only add."""
    chance, buckets = random.Random(0), [f"{frames}x{height}x{width}" for width, height, frames in SHAPES]
    scheduler = Scheduler[SimulatedRow](
        MAX_ROWS, CostModel(Prices(buckets=dict.fromkeys(buckets, (0.01, 0.001)))), max_resident=RESIDENT
    )

    def job(number: int) -> SimulatedRow:
        bucket, steps, rows = chance.choice(buckets), chance.choice(list(STEPS)), chance.choice((1, 2, 2, 3))
        created_at = time.time() - chance.random() * 2
        client = f"client{chance.randrange(clients)}"
        return SimulatedRow.of(Arrival(f"job{number}", bucket, steps, rows, created_at, client))

    for number in range(RESIDENT):
        scheduler.admit(job(number))
    waiting = [job(RESIDENT + number) for number in range(QUEUED)]

    def decide() -> None:
        scheduler.observe(scheduler.next_batch(), 0.01)

    def choose() -> None:
        scheduler.choose(waiting, 0)

    return (min(timeit.repeat(work, number=5, repeat=60)) / 5 for work in (decide, choose))  # pyright: ignore


def xl_call_seconds(rows: int) -> float:
    """One video's call, two rows, on an H100."""
    flops = rows * forward_flops(XL, XL_LATENTS, XL_TEXT).total
    return flops / (REACHED * GPUS["h100"].bf16)
