"""The canary's statistics: its rate of false aborts holds by simulation, and every check says what it must."""

import math
import random
from collections.abc import Callable
from itertools import combinations

import pytest

from infra.rollout.analysis import Analysis, AnalysisLimits, Judgement, Standing
from infra.rollout.canary import CanaryPlan
from infra.rollout.counts import Batch, Look
from infra.rollout.sequential import WorseThanBaseline, WorseThanRate

ALPHA = 0.05
READY = Standing(ready=True, restarts=0)


def binomial(dice: random.Random, n: int, rate: float) -> int:
    return sum(dice.random() < rate for _ in range(n))


def upper_bound(events: int, n: int) -> float:
    """Of a rate of which `events` in `n` were seen, one-sided, 99.9 %."""
    share = events / n
    return share + 3.09 * math.sqrt(max(share, 1 / n) / n)


@pytest.mark.parametrize(("ours", "theirs"), [(0.05, 0.05), (0.02, 0.05), (0.5, 0.5)])
def test_a_canary_as_good_as_stable_is_refused_no_oftener_than_stated(ours: float, theirs: float) -> None:
    """200 looks of unequal size, and a look at every one: a test of a fixed size would refuse one in three."""
    dice, refused, runs = random.Random(1), 0, 300
    for _ in range(runs):
        test = WorseThanBaseline()
        for _ in range(100):
            n, m = dice.randrange(0, 4), dice.randrange(0, 12)
            test.update(binomial(dice, n, ours), n, binomial(dice, m, theirs), m)
        refused += test.rejects(ALPHA)
    assert refused / runs <= ALPHA
    assert refused == 0 or upper_bound(refused, runs) < 3 * ALPHA


def test_what_is_tolerated_is_tolerated_and_what_is_far_worse_is_found() -> None:
    dice = random.Random(2)

    def share(rate: float, tolerance: float) -> float:
        found = 0
        for _ in range(100):
            test = WorseThanBaseline(tolerance)
            for _ in range(60):
                test.update(binomial(dice, 2, rate), 2, binomial(dice, 6, 0.1), 6)
            found += test.rejects(ALPHA)
        return found / 100

    assert share(0.17, tolerance=2.0) <= ALPHA, "odds of 0.2 against 0.11 are less than twofold"
    assert share(0.6, tolerance=2.0) > 0.95


def test_a_rate_within_its_budget_is_refused_no_oftener_than_stated_and_one_above_it_is_found() -> None:
    dice = random.Random(3)

    def share(rate: float) -> float:
        found = 0
        for _ in range(300):
            test = WorseThanRate(0.144)
            for _ in range(100):
                test.update(binomial(dice, 2, rate), 2)
            found += test.rejects(ALPHA)
        return found / 300

    assert share(0.144) <= ALPHA
    assert share(0.5) > 0.99


@pytest.mark.parametrize("make", [lambda: WorseThanBaseline(2.0), lambda: WorseThanBaseline(1.0)])
def test_the_expected_wealth_after_a_batch_is_exactly_one_under_the_null(make: Callable[[], WorseThanBaseline]) -> None:
    """What Ville's inequality asks for, summed over every way that 3 events can fall on 4 and 5 trials."""
    tolerance = make().tolerance
    weights, wealth = [], []
    for ours in range(4):
        ways = math.comb(4, ours) * math.comb(5, 3 - ours) * tolerance**ours
        test = make()
        test.update(ours, 4, 3 - ours, 5)
        weights.append(ways)
        wealth.append(math.exp(test.log_wealth))
    assert sum(w * v for w, v in zip(weights, wealth, strict=True)) / sum(weights) == pytest.approx(1)


def test_evidence_once_shown_stays() -> None:
    test = WorseThanBaseline()
    for _ in range(12):
        test.update(1, 1, 0, 5)
    assert test.rejects(ALPHA)
    for _ in range(500):
        test.update(0, 1, 1, 5)
    assert test.rejects(ALPHA)


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2 and 0 of 1 are no counts"):
        WorseThanBaseline().update(3, 2, 0, 1)
    with pytest.raises(ValueError, match="tolerated rate of 1"):
        WorseThanRate(1.0)
    with pytest.raises(ValueError, match=r"weights \(50, 10\) must rise"):
        CanaryPlan(weights=(50, 10))


# --- the verdict


def batch(completed: int = 4, *, bad: int = 0, slow: int = 0, blank: int = 0) -> Batch:
    """A class of work whose edge of slowness is at 1 s."""
    within = {"1e6": {1.0: completed - slow, 10.0: completed, math.inf: completed}}
    return Batch(completed=completed, bad=bad, frames=8 * completed, blank=8 * blank, within=within)


def look(canary: Batch, stable: Batch | None = None, *, memory: float = 1.0, scraped: bool = True) -> Look:
    memories = {"stable": 1e9, "canary": memory * 1e9} if scraped else {"stable": 1e9}
    batches = {"stable": stable or batch(20), "canary": canary}
    return Look(batches, up={"stable": True, "canary": scraped}, memory_bytes=memories)  # pyright: ignore[reportArgumentType]


def judged(each: Look | None, *, looks: int = 12, standing: Standing = READY) -> tuple[Judgement, int]:
    """The first verdict that is no longer inconclusive, and at which look; the last if none."""
    analysis = Analysis(AnalysisLimits(min_samples=30))
    judgement = analysis.judge(look(batch(0)), READY)
    for number in range(1, looks + 1):
        judgement = analysis.judge(each, standing)
        if judgement.verdict != "inconclusive":
            return judgement, number
    return judgement, looks


def test_a_good_canary_passes_once_it_has_made_enough_videos() -> None:
    judgement, looks = judged(look(batch(4)))
    assert judgement.verdict == "pass" and looks == 8
    assert judgement.words == "every check passed"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (look(batch(2, bad=2)), "errors: "),
        (look(batch(0, bad=4), batch(0, bad=4)), "error budget: "),
        (look(batch(4, slow=4)), "latency: "),
        (look(batch(4, blank=3)), "blank frames: "),
        (look(batch(4), memory=1.6), "memory: 1.60 times stable's"),
    ],
)
def test_a_bad_canary_fails_before_it_could_pass_and_the_words_say_why(bad: Look, why: str) -> None:
    judgement, looks = judged(bad)
    assert judgement.verdict == "fail" and looks < 8
    assert why in judgement.words


@pytest.mark.parametrize(
    ("silent", "why"),
    [
        (None, "metrics: Prometheus gives no answer"),
        (look(batch(0)), "samples: 0 of 30"),
        (look(Batch(), scraped=False), "metrics: Prometheus cannot read canary"),
        (look(batch(4), batch(0)), "latency samples: 0 of 30"),
    ],
)
def test_silence_is_neither_good_nor_bad(silent: Look | None, why: str) -> None:
    judgement, _ = judged(silent, looks=200)
    assert judgement.verdict == "inconclusive"
    assert why in judgement.words


def test_a_canary_that_is_not_ready_or_starts_anew_fails_even_without_metrics() -> None:
    judgement, looks = judged(None, standing=Standing(ready=False, restarts=0))
    assert judgement.verdict == "fail" and looks == 3 and "not ready at 3 looks in a row" in judgement.words
    judgement, _ = judged(None, standing=Standing(ready=True, restarts=2))
    assert "the canary was started anew 2 times" in judgement.words


def test_every_single_inconclusive_check_holds_a_canary() -> None:
    for left_out in combinations(("stable", "canary"), 1):
        seen = look(batch(4))
        kept = {track: value for track, value in seen.memory_bytes.items() if track not in left_out}
        judgement, _ = judged(Look(seen.batches, seen.up, kept), looks=50)  # pyright: ignore[reportArgumentType]
        assert judgement.verdict == "inconclusive" and "memory: not known of both" in judgement.words
