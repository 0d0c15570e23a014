"""What ReleaseFlow's steps ask for, and what their cards show: plan, key, signatures, the canary and its figures.

It owns the card's content and how a home gets its first engine; the order of a release is `infra.rollout.release`'s.
"""

import os
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from metaflow.cards import Image, Markdown, Table, VegaChart  # pyright: ignore[reportPrivateImportUsage]

from export.bundle import PICTURE
from flows.cards import Card, Cells
from infra.engines.export import ExportedEngine, read_parity
from infra.registry.registry import Registry
from infra.rollout.canary import CanaryPlan, Observation, OnLook, Outcome
from infra.rollout.home import Home
from infra.rollout.prometheus import Prometheus
from infra.rollout.release import Release, Terms, first_release, release, sign_candidate, stable_engine

VERDICTS = ("pass", "inconclusive", "fail")


def read_plan(path: str | None) -> CanaryPlan:
    """The plan in a TOML file, or the one that holds unless said."""
    if path is None:
        return CanaryPlan()
    try:
        return CanaryPlan.model_validate(tomllib.loads(Path(path).read_text()))
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no plan of a canary: {error}") from None


def require_key(key: str | None) -> None:
    """Before anything is built: without a signature nothing is released."""
    if key is None or not Path(key).is_file():
        raise ValueError(
            f"--key {key or 'is not given'}: a release is signed, so name the private key; `stiv keygen` makes a pair"
        )


def sign_engines(registry: Registry, digests: Iterable[str], key: str, *, who: str) -> None:
    """Sign each; `release/candidate` points at the last."""
    password = os.environ.get("STIV_KEY_PASSWORD")
    for digest in digests:
        sign_candidate(registry, digest, Path(key), password.encode() if password else None, who=who)


def lead(registry: Registry, digest: str, home: Home, terms: Terms, on_look: OnLook | None = None) -> Release:
    """Through its canary in `home`; the very first engine, with nothing to stand beside, goes live as it is."""
    stable = stable_engine(registry)
    if stable is None:
        first_release(registry, digest, who=terms.who)
        home.up(digest)
        outcome = Outcome(decision="promote", reason="the first release", seconds=0.0, observations=())
        return Release(engine=digest, before=None, outcome=outcome)
    home.up(stable.digest)
    prometheus = Prometheus(home.state.prometheus_url)
    try:
        return release(registry, digest, home, prometheus, terms, on_look)
    finally:
        prometheus.close()


def show_engine(card: Card, registry: Registry, done: ExportedEngine) -> None:
    """Parity's figures and picture of one target."""
    card.append(Markdown(f"# Engine `{done.manifest.digest[:16]}`{', reused' if done.reused else ''}"))
    if done.parity is None:
        card.append(Markdown("Built, not proven: this machine cannot run it."))
        return
    _show_parity(card, registry, done.manifest.digest)


class ReleaseCard:
    """The canary's card: parity first, then every look as it comes, then the decision."""

    def __init__(self, card: Card, registry: Registry, digest: str) -> None:
        self._card = card
        self._seen: list[Observation] = []
        self._state = Markdown("the canary starts")
        self._chart = VegaChart(_looks_spec([]))
        card.append(Markdown(f"# Release of engine `{digest[:16]}`"), id="title")
        card.append(self._state, id="state")
        card.append(self._chart, id="looks")
        _show_parity(card, registry, digest)
        card.refresh()

    def look(self, seen: Observation) -> None:
        self._seen.append(seen)
        self._state.update(f"at {seen.weight} %: **{seen.verdict}**, {seen.words}")  # pyright: ignore[reportUnknownMemberType]
        self._chart.update(_looks_spec(self._seen))  # pyright: ignore[reportUnknownMemberType]
        self._card.refresh()

    def finish(self, done: Release) -> None:
        outcome = done.outcome
        word = "promoted" if outcome.decision == "promote" else "went back"
        self._card.append(Markdown(f"## Decision: {word}"))
        self._card.append(Markdown(outcome.reason))
        if outcome.seconds_to_roll_back is not None:
            self._card.append(Markdown(f"Back after {outcome.seconds_to_roll_back:.2f} s."))
        if outcome.observations:
            rows: Cells = [list(check) for check in outcome.observations[-1].checks]
            self._card.append(Table(rows, headers=["check", "verdict", "found"]))


def _show_parity(card: Card, registry: Registry, digest: str) -> None:
    manifest = registry.manifest(digest)
    report = read_parity(registry, manifest)
    if report is not None:
        rows: Cells = [[check.what, f"{check.found:.3g}", f"{check.bound:g}"] for check in report.checks()]
        card.append(Table(rows, headers=["parity check", "found", "bound"]))
    if PICTURE in manifest.files:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / PICTURE
            registry.store.fetch_file(manifest.files[PICTURE].digest, copy)
            card.append(Image(copy.read_bytes(), label="error along each trajectory, and frames of both engines"))


def _looks_spec(seen: list[Observation]) -> dict[str, object]:
    """A Vega-Lite chart: the canary's weight over time, a point a look, coloured by its verdict."""
    values = [{"seconds": each.at, "weight": each.weight, "verdict": each.verdict} for each in seen]
    colours = {"domain": list(VERDICTS), "range": ["#2ca02c", "#ff7f0e", "#d62728"]}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": values},
        "height": 160,
        "mark": {"type": "point", "filled": True, "size": 70, "tooltip": True},
        "encoding": {
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds since the canary began"},
            "y": {
                "field": "weight",
                "type": "quantitative",
                "title": "percent of new videos",
                "scale": {"domain": [0, 100]},
            },
            "color": {"field": "verdict", "type": "nominal", "scale": colours},
        },
    }
