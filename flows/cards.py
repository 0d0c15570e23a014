"""What a training step shows on its Metaflow card: live while the ranks train, and the verdict when they are done.

It owns the card's content; it does not know where progress comes from, nor anything of training. A card is given by
`current.card` in a step decorated with `@card(type="blank")`, or by `current.card[ID]` where it has an id.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from metaflow.cards import Image, Markdown, MetaflowCardComponent, ProgressBar, Table, VegaChart  # pyright: ignore[reportPrivateImportUsage]

from flows.curves import ACCOUNTS, loss_points, time_parts
from flows.figures import duration, figure, percent, task_name
from infra.registry.records import GateReport
from model.recipe import StageRecipe
from model.training.run import ProgressLine

if TYPE_CHECKING:  # Metaflow runs the flow's imports anew for every refresh, and this one is PyTorch
    from infra.launch.stage import StageOutcome

Cells = list[list[str | MetaflowCardComponent]]

CHART_POINTS = 200
"""The chart is sent whole at each refresh."""


class Card(Protocol):
    """What is used of `current.card`."""

    def append(self, component: MetaflowCardComponent, id: str | None = None) -> None: ...

    def refresh(self) -> None: ...


class TrainingCard:
    """The card of one stage. Components are appended once and then updated in place, so a viewer never reloads."""

    def __init__(self, card: Card, recipe: StageRecipe) -> None:
        self._card = card
        self._bar = ProgressBar(max=recipe.training.total_steps, label="optimizer steps", value=0)
        self._state = Markdown("waiting for the first step")
        self._chart = VegaChart(_loss_spec([], recipe.training.total_steps))
        self._time = VegaChart(_time_spec({}))
        card.append(Markdown(f"# {recipe.name}: {task_name(recipe.task)}"), id="title")
        card.append(self._bar, id="progress")
        card.append(self._state, id="state")
        card.append(self._chart, id="loss")
        card.append(self._time, id="time")
        card.refresh()

    def update(self, progress: Sequence[ProgressLine]) -> None:
        """Show all progress lines so far; Metaflow itself drops refreshes that come too fast."""
        if progress:
            self._show(progress)
            self._card.refresh()

    def finish(self, outcome: "StageOutcome") -> None:
        """Add what evaluation and gate made of the checkpoint; Metaflow draws the card once more as the step ends."""
        if outcome.progress:
            self._show(outcome.progress)
        if outcome.booked is not None:
            self._time.update(_time_spec(outcome.booked.seconds))  # pyright: ignore[reportUnknownMemberType]
        parts: list[tuple[str, MetaflowCardComponent]] = [
            ("verdict", Markdown(f"## Gate: {'promoted' if outcome.gate.passed else 'refused'}")),
            ("gate", _gate_table(outcome.gate)),
            ("checkpoint", Markdown(f"checkpoint `{outcome.checkpoint.digest}`")),
            ("samples_title", Markdown("## Samples")),
            ("samples", Image(outcome.grid.read_bytes(), label="a caption a row, its frames beside it")),
            ("evaluation_title", Markdown("## Evaluation")),
            ("evaluation", _metrics_table(outcome.checkpoint.metrics)),
        ]
        for name, component in parts:
            self._card.append(component, id=name)

    def _show(self, progress: Sequence[ProgressLine]) -> None:
        last = progress[-1]
        steps_left = last.total_steps - last.step
        self._bar.update(
            last.step, metadata=f"about {duration(last.step_seconds * steps_left)} left" if steps_left else "trained"
        )
        self._state.update(  # pyright: ignore[reportUnknownMemberType]
            f"loss **{figure(last.loss)}** · {figure(last.samples_per_second)} samples/s · "
            f"{duration(last.step_seconds)} a step · gradient norm {figure(last.grad_norm)} · "
            f"learning rate {last.learning_rate:.2g} · trained for {duration(last.elapsed_seconds)}"
            + "".join(f" · {words}" for words in _efficiency(last))
        )
        self._chart.update(_loss_spec(progress, last.total_steps))  # pyright: ignore[reportUnknownMemberType]
        self._time.update(_time_spec(last.spent_seconds or {}))  # pyright: ignore[reportUnknownMemberType]


def _efficiency(line: ProgressLine) -> Iterator[str]:
    """How well the hardware is used, as far as it is known."""
    for name, share in (("goodput", line.goodput), ("MFU", line.mfu), ("HFU", line.hfu)):
        if share is not None:
            yield f"{name} **{percent(share)}**"
    if line.data_wait_seconds is not None:
        yield f"{percent(line.data_wait_seconds / line.step_seconds)} of a step waits for data"
    if line.straggler_ratio is not None:
        yield f"slowest rank {line.straggler_ratio:.2f} \N{MULTIPLICATION SIGN} the median"


def _gate_table(gate: GateReport) -> Table:
    rows: Cells = [
        [result.rule.metric, figure(result.value), result.rule.wanted, "passed" if result.passed else "failed"]
        for result in gate.rules
    ]
    return Table(rows, headers=["figure", "measured", "must be", "verdict"])


def _metrics_table(metrics: Mapping[str, float]) -> Table:
    rows: Cells = [
        [name, percent(value) if name.endswith("_accuracy") else figure(value)] for name, value in metrics.items()
    ]
    return Table(rows, headers=["figure", "measured"])


def _loss_spec(progress: Sequence[ProgressLine], total_steps: int) -> dict[str, object]:
    """A Vega-Lite chart: the loss as logged, pale, and its average over it."""
    values = [
        {"step": point.step, "loss": round(point.loss, 5), "average": round(point.smoothed, 5)}
        for point in loss_points(progress, CHART_POINTS)
    ]
    x = {"field": "step", "type": "quantitative", "title": "optimizer step", "scale": {"domain": [0, total_steps]}}
    y = {"type": "quantitative", "title": "flow-matching loss", "scale": {"zero": True}}
    tooltip = [{"field": name, "type": "quantitative"} for name in ("step", "loss", "average")]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": values},
        "height": 260,
        "layer": [
            {"mark": {"type": "line", "color": "#a9c5f5"}, "encoding": {"x": x, "y": {**y, "field": "loss"}}},
            {
                "mark": {"type": "line", "color": "#2f6fdb", "strokeWidth": 2.5, "tooltip": True},
                "encoding": {"x": x, "y": {**y, "field": "average"}, "tooltip": tooltip},
            },
        ],
    }


def _time_spec(spent_seconds: Mapping[str, float]) -> dict[str, object]:
    """A Vega-Lite chart: the run's time as one bar, a colour for what it was spent on."""
    values = [
        {"spent on": part.words, "seconds": round(part.seconds, 3), "percent": part.share, "order": order}
        for order, part in enumerate(time_parts(spent_seconds))
    ]
    words, colors = zip(*ACCOUNTS.values(), strict=True)
    scale = {"domain": words, "range": colors}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": values},
        "height": 40,
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": {"field": "seconds", "type": "quantitative", "title": "where the time went, in seconds"},
            "color": {
                "field": "spent on",
                "type": "nominal",
                "scale": scale,
                "legend": {"orient": "bottom", "title": None},
            },
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [
                {"field": "spent on", "type": "nominal"},
                *({"field": name, "type": "quantitative"} for name in ("seconds", "percent")),
            ],
        },
    }
