"""A curriculum's plan on the screen, or as JSON: `model.planning` counts, this shows."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from model.planning.plan import DAY, HOUR, LayoutPlan, Plan, StagePlan

NOTE = (
    "Predicted from shapes, before anything has run (docs/plan.md says from which figures): loading, checkpoints and"
    " waiting are not in it, and memory may be out by a tenth."
)
_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "masters": "masters",
    "momentum": "momentum",
    "second_moment": "2nd",
    "average": "EMA",
    "codec": "codec",
    "encoding": "encode *",
    "activations": "activ. *",
    "stepping": "step *",
}


def show(plan: Plan, console: Console) -> None:
    """Every stage's cost in its best layout, its memory by part, that layout, and how to choose it."""
    for table in (_costs(plan), _memory(plan), _layouts(plan)):
        console.print(table)
    hours = plan.seconds * plan.gpus / HOUR
    console.print(f"whole curriculum: {plan.seconds / DAY:,.1f} days, {hours:,.0f} GPU-hours")
    if plan.settings:
        console.print("best layouts: " + " ".join(f'--set "{line}"' for line in plan.settings), soft_wrap=True)
    console.print(NOTE, soft_wrap=True)


def as_json(plan: Plan) -> str:
    """The whole plan: bytes, seconds and operations, as `model.planning.plan` names them."""
    stages: list[dict[str, Any]] = []
    for stage in plan.stages:
        tree = asdict(stage)
        tree["best"] |= _totals(stage.best, plan.gpus)
        if stage.written is not None:
            tree["written"] |= _totals(stage.written, plan.gpus)
        stages.append(tree)
    totals = {"days": plan.seconds / DAY, "gpu_hours": plan.seconds * plan.gpus / HOUR}
    return json.dumps({**asdict(plan), "stages": stages, "settings": plan.settings, **totals}, indent=2)


def _totals(layout: LayoutPlan, gpus: int) -> dict[str, float]:
    return {
        "peak": layout.memory.peak,
        "days": layout.seconds / DAY,
        "gpu_hours": layout.seconds * gpus / HOUR,
    }


def _costs(plan: Plan) -> Table:
    title = (
        f"{plan.curriculum} on {plan.gpus} x {plan.gpu.name}: each stage in its best layout, masked / unmasked steps"
    )
    table = Table("stage", title=title, title_justify="left")
    for column in ("parameters", "steps", "tokens", "FLOPs", "s a step", "MFU", "days", "GPU-hours"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        phases, seconds = stage.best.phases, stage.best.seconds
        table.add_row(
            stage.name,
            _short(stage.parameters),
            _each([_short(phase.steps) for phase in phases]),
            _short(phases[0].cost.tokens),
            _each([_short(phase.cost.model_flops) for phase in phases]),
            _each([f"{phase.time.total:.2f}" for phase in phases]),
            _each([f"{phase.mfu:.1%}" for phase in phases]),
            f"{seconds / DAY:,.1f}",
            f"{seconds * plan.gpus / HOUR:,.0f}",
        )
    return table


def _memory(plan: Plan) -> Table:
    title = f"GB a gpu, of {plan.usable / 1e9:.1f} that can be filled; of parts with * one is there at a time"
    table = Table("stage", title=title, title_justify="left")
    for column in (*_PARTS.values(), "peak"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        held = stage.best.memory
        sizes = [*(getattr(held, part) for part in _PARTS), held.peak]
        table.add_row(stage.name, *(f"{size / 1e9:.1f}" for size in sizes))
    return table


def _layouts(plan: Plan) -> Table:
    table = Table("stage", "layout", title="layouts: as written, and the best", title_justify="left")
    for column in ("ZeRO", "sequence", "recompute", "micro-batch", "GB", "days"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        table.add_row(stage.name, *_written(stage))
        table.add_row("", *_row("best", stage.best), end_section=True)
    return table


def _written(stage: StagePlan) -> list[str]:
    if stage.written is None:
        return [f"cannot be: {stage.refusal}"]
    return _row("as written" if stage.written.fits else "as written: does not fit", stage.written)


def _row(name: str, plan: LayoutPlan) -> list[str]:
    layout = plan.layout
    return [
        name,
        str(layout.zero_stage),
        str(layout.sequence_parallel),
        "yes" if layout.activation_checkpointing else "no",
        str(layout.micro_batch_size),
        f"{plan.memory.peak / 1e9:.1f}",
        f"{plan.seconds / DAY:,.1f}",
    ]


def _short(count: float) -> str:
    """Three digits and a suffix: 8.83B."""
    for suffix in ("", "k", "M", "B", "T", "P", "E"):
        if count < 999.5:
            return f"{count:.3g}{suffix}"
        count /= 1000
    return f"{count:.3g}Z"


def _each(values: list[str]) -> str:
    return " / ".join(values)
