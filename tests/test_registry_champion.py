"""The rule beside the champion: figures paired by sample, an interval, and every way in which they do not pair."""

import json
from pathlib import Path

import numpy as np
import pytest

from flows.catalog import recipe_path
from infra.registry.bootstrap import mean_interval
from infra.registry.gate import Champion, PromotionRefused, evaluate_gate
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.store.folder import FolderStore
from model.config import ChampionRule, GateRule
from model.measures.samples import SampleFigures
from model.recipe import RecipeError, load

RULE = ChampionRule(metric="loss", not_worse_by=0.05, better="lower")
CHAMPION = "c" * 64
HELDOUT = {"heldout": "one"}


def figures(values: list[float], *, metric: str = "loss", first: int = 0, **conditions: str) -> SampleFigures:
    named = {f"clip-{first + place:03d}": value for place, value in enumerate(values)}
    return SampleFigures(conditions=HELDOUT | conditions, figures={metric: named})


def spread(mean: float, count: int = 32) -> list[float]:
    return [mean + 0.2 * np.sin(place) for place in range(count)]


def verdict(ours: SampleFigures | None, theirs: SampleFigures | None, rule: ChampionRule = RULE) -> tuple[bool, str]:
    values = list(ours.figures.get("loss", {}).values()) if ours else []
    metrics = {"loss": sum(values) / len(values) if values else 0.4}
    (result,) = evaluate_gate([rule], metrics, ours, Champion(CHAMPION, theirs)).rules
    return result.passed, result.reason


def test_pairs_tell_what_means_cannot() -> None:
    """Samples differ by 0.2 among each other; the same small step on each is seen all the same."""
    champion = figures(spread(0.4))
    assert verdict(figures(spread(0.44)), champion)[0], "worse by 0.04 on every clip, 0.05 is allowed"
    assert not verdict(figures(spread(0.46)), champion)[0]
    assert verdict(figures(spread(0.3)), champion)[0]


def test_an_uncertain_difference_is_no_pass_even_where_the_mean_is_within_the_margin() -> None:
    rng = np.random.default_rng(0)
    noisy = [value + step for value, step in zip(spread(0.4), rng.normal(0.02, 0.4, 32), strict=True)]
    passed, reason = verdict(figures(noisy), figures(spread(0.4)))
    assert not passed
    assert "on 32 samples" in reason and "95% paired bootstrap, 10000 resamples" in reason


def test_higher_can_be_better() -> None:
    rule = ChampionRule(metric="loss", not_worse_by=0.05, better="higher")
    assert verdict(figures(spread(0.9)), figures(spread(0.4)), rule)[0]
    assert not verdict(figures(spread(0.3)), figures(spread(0.4)), rule)[0]


def test_without_a_champion_the_rule_passes_and_says_so() -> None:
    (result,) = evaluate_gate([RULE], {"loss": 0.4}, figures(spread(0.4)), None).rules
    assert result.passed and "no champion yet" in result.reason


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (None, figures(spread(0.4)), "it was published without figures by sample"),
        (figures(spread(0.4)), None, "the champion was published without figures by sample"),
        (figures(spread(0.4), first=1), figures(spread(0.4)), "2 are of one of them only, such as 'clip-000'"),
        (figures(spread(0.4), heldout="two"), figures(spread(0.4)), "heldout is two, the champion's one"),
        (figures(spread(0.4)), figures(spread(0.4), codec="x"), "codec is None, the champion's x"),
        (figures(spread(0.4)), figures(spread(0.4), metric="psnr"), r"no figures by sample of that metric, only"),
        (figures(spread(0.4, 7)), figures(spread(0.4, 7)), "7 samples are too few"),
        (figures([np.inf, *spread(0.4)]), figures([0.4, *spread(0.4)]), "nan or infinite"),
    ],
)
def test_what_does_not_pair_fails_and_says_why(
    ours: SampleFigures | None, theirs: SampleFigures | None, said: str
) -> None:
    passed, reason = verdict(ours, theirs)
    assert not passed
    assert said in reason and "cannot be compared with champion cccccccccccccccc" in reason


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        _, low, high = mean_interval(rng.normal(0.1, 1, 40).tolist(), confidence=0.9, resamples=1000, seed=trial)
        held += low <= 0.1 <= high
    assert 165 <= held <= 195


def test_the_interval_is_the_same_every_time() -> None:
    values = np.random.default_rng(2).normal(size=20).tolist()
    ends = [mean_interval(values, confidence=0.95, resamples=2000, seed=3) for _ in range(2)]
    assert ends[0] == ends[1] != mean_interval(values, confidence=0.95, resamples=2000, seed=4)


# --- in a registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(FolderStore(tmp_path / "store"))


def publish(registry: Registry, folder: Path, mean: float, *, bound: float = 1.0) -> Manifest:
    folder.mkdir(exist_ok=True)
    samples = folder / f"{mean}.json"
    figures(spread(mean)).write(samples)
    rules = (RULE, GateRule(metric="loss", op="<", bound=bound))
    return registry.publish("checkpoint", {"evaluation/samples.json": samples}, rules=rules, metrics={"loss": mean})


def test_a_promotion_is_held_against_what_the_ref_points_at(registry: Registry, tmp_path: Path) -> None:
    first, better, worse = (publish(registry, tmp_path / "in", mean) for mean in (0.4, 0.3, 0.38))
    unseen = registry.promote("t2v/promoted", first.digest, who="ann", why="first")
    assert unseen.gate.champion is None
    moved = registry.promote("t2v/promoted", better.digest, who="ann", why="better")
    assert moved.gate.champion == first.digest
    comparison = moved.gate.rules[0].comparison
    assert comparison and comparison.worse_by == pytest.approx(-0.1) and comparison.samples == 32
    with pytest.raises(PromotionRefused, match=r"loss is worse than champion .* by 0\.08"):
        registry.promote("t2v/promoted", worse.digest, who="bob", why="hope")
    assert registry.history("t2v/promoted") == (moved, unseen)


def test_an_override_is_not_laundered_by_promoting_again(registry: Registry, tmp_path: Path) -> None:
    """Once it is promoted it must not become its own champion, from which it differs by nothing."""
    good, bad = publish(registry, tmp_path / "in", 0.3), publish(registry, tmp_path / "in", 0.5)
    registry.promote("t2v/promoted", good.digest, who="ann", why="first")
    registry.promote("t2v/promoted", bad.digest, who="bob", why="demo", override="the demo must go on")
    with pytest.raises(PromotionRefused, match="loss is worse than champion"):
        registry.promote("t2v/promoted", bad.digest, who="bob", why="again")


# --- in a recipe


def test_a_recipe_takes_the_rule_and_says_what_is_wrong_with_it() -> None:
    tiny = recipe_path("tiny")
    assert [type(rule) for rule in load(tiny).stage("ti2v").gate][-1] is ChampionRule
    for text, said in (
        ("{metric='loss', not_worse_by=-1, better='lower'}", "t2v.gate.0.not_worse_by"),
        ("{metric='loss', not_worse_by=1}", "t2v.gate.0.better"),
        ("{metric='loss', not_worse_by=1, better='lower', op='<'}", "t2v.gate.0.op"),
    ):
        with pytest.raises(RecipeError, match=said):
            load(tiny, [f"t2v.gate=[{text}]"])


def test_samples_survive_json_and_odd_files_are_refused() -> None:
    kept = figures([0.1, float("nan")])
    again = SampleFigures.loads(kept.dumps())
    assert again.conditions == kept.conditions and json.loads(kept.dumps())["figures"]["loss"]["clip-001"] == "NaN"
    with pytest.raises(ValueError, match="version"):
        SampleFigures.loads(b'{"version": 2, "conditions": {}, "figures": {}}')
