"""A plan of a curriculum on given cards: what each stage takes, how long it is predicted to last, and its best layout.

It owns the choice between layouts; memory, speed and the layouts themselves are counted by the modules below it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from model.network.cost import Cost
from model.planning.gpu import Gpu
from model.planning.layout import Layout, layouts, spread
from model.planning.memory import PASSING, Memory, memory, parameters, usable
from model.planning.phase import phases
from model.planning.speed import StepTime, mfu, step_cost, step_time
from model.recipe import Curriculum, StageRecipe

ALIKE = 1.02
"""Layouts within two per cent of the fastest count as equal: the simplest of them is taken."""
DAY, HOUR = 86_400, 3_600
SAFE = 0.9
"""A plan may be out by a tenth of the memory: a layout that leaves as much is preferred."""


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """Steps of a stage that mask alike."""

    name: str
    steps: int
    cost: Cost
    """Of a step, on all cards."""
    time: StepTime
    mfu: float


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """A stage in one layout."""

    layout: Layout
    memory: Memory
    fits: bool
    phases: tuple[PhasePlan, ...]

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return sum(phase.steps * phase.time.total for phase in self.phases)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage as its recipe spreads it, and as it is best spread."""

    name: str
    parameters: int
    recipe_layout: Layout
    """As the recipe says, for as many ranks as it says."""
    written: LayoutPlan | None
    """The same on the cards of the plan; None where it cannot be, and `refusal` says why."""
    refusal: str
    best: LayoutPlan


@dataclass(frozen=True, slots=True)
class Plan:
    """A curriculum on given cards, each stage in its best layout. All of it is a prediction."""

    curriculum: str
    gpu: Gpu
    gpus: int
    usable: int
    """Bytes of a card that allocations can fill."""
    stages: tuple[StagePlan, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.best.seconds for stage in self.stages)

    @property
    def settings(self) -> list[str]:
        """`--set` values that turn the recipe's layouts into the best ones: of all stages, then of exceptions."""
        lines: list[str] = []
        exceptions: list[str] = []
        for key in Layout.__dataclass_fields__:
            wanted = {stage.name: getattr(stage.best.layout, key) for stage in self.stages}
            if all(wanted[stage.name] == getattr(stage.recipe_layout, key) for stage in self.stages):
                continue
            usual = Counter(wanted.values()).most_common(1)[0][0]
            lines.append(f"*.training.{key}={_toml(usual)}")
            exceptions += [f"{n}.training.{key}={_toml(value)}" for n, value in wanted.items() if value != usual]
        return lines + exceptions


def plan(curriculum: Curriculum, gpu: Gpu, gpus: int | None = None) -> Plan:
    """On so many cards, or on as many as the recipe says."""
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus {gpus}: a plan needs at least one")
    count = gpus or max(stage.training.world_size for stage in curriculum.stages)
    stages = tuple(plan_stage(stage, gpu, count) for stage in curriculum.stages)
    return Plan(curriculum.name, gpu, count, usable(gpu), stages)


def plan_stage(recipe: StageRecipe, gpu: Gpu, gpus: int) -> StagePlan:
    written, refusal = None, ""
    try:
        written = weigh(spread(recipe, replace(Layout.of(recipe.training), world_size=gpus)), gpu)
    except ValueError as error:
        refusal = str(error)
    return StagePlan(
        name=recipe.name,
        parameters=parameters(recipe).total,
        recipe_layout=Layout.of(recipe.training),
        written=written,
        refusal=refusal,
        best=best_layout(recipe, gpu, gpus),
    )


def best_layout(recipe: StageRecipe, gpu: Gpu, gpus: int) -> LayoutPlan:
    """The fastest that fits, which is the cheapest on a given number of cards; of like ones the simplest."""
    weighed = [weigh(candidate, gpu) for candidate in layouts(recipe, gpus, gpu.node)]
    if not weighed:
        raise ValueError(
            f"stage '{recipe.name}': {gpus} gpus cannot share training.global_batch_size"
            f" {recipe.training.global_batch_size} evenly; take {_divisors(recipe.training.global_batch_size, gpus)}"
        )
    fitting = [candidate for candidate in weighed if candidate.fits]
    if not fitting:
        raise ValueError(_does_not_fit(recipe, weighed, gpu, gpus))
    fitting = [c for c in fitting if c.memory.peak <= SAFE * usable(gpu)] or fitting
    fastest = min(candidate.seconds for candidate in fitting)
    return min((c for c in fitting if c.seconds <= ALIKE * fastest), key=_complexity)


def weigh(recipe: StageRecipe, gpu: Gpu) -> LayoutPlan:
    """The stage as its recipe spreads it."""
    held = memory(recipe)
    plans: list[PhasePlan] = []
    for phase in phases(recipe):
        time, cost = step_time(phase, gpu), step_cost(phase)
        plans.append(PhasePlan(phase.name, phase.steps, cost, time, mfu(recipe.training, cost, time.total, gpu)))
    return LayoutPlan(Layout.of(recipe.training), held, held.peak <= usable(gpu), tuple(plans))


def _complexity(candidate: LayoutPlan) -> tuple[float, ...]:
    layout = candidate.layout
    return (
        layout.sequence_parallel,
        layout.zero_stage,
        layout.activation_checkpointing,
        candidate.memory.peak,
    )


def _toml(value: object) -> str:
    return str(value).lower()


def _does_not_fit(recipe: StageRecipe, weighed: Iterable[LayoutPlan], gpu: Gpu, gpus: int) -> str:
    leanest = min(weighed, key=lambda candidate: candidate.memory.peak)
    parts = asdict(leanest.memory)
    largest = max(parts, key=lambda part: parts[part])
    passing = max(PASSING, key=lambda part: parts[part])
    over = leanest.memory.peak - usable(gpu)
    return (
        f"stage '{recipe.name}' fits {gpus} x {gpu.name} in no layout: the leanest ({leanest.layout}) takes"
        f" {leanest.memory.peak / 1e9:.1f} GB a gpu, {over / 1e9:.1f} GB above the {usable(gpu) / 1e9:.1f} GB there"
        f" are; its largest part is {largest.replace('_', ' ')} with {parts[largest] / 1e9:.1f} GB, its largest"
        f" passing one {passing} with {parts[passing] / 1e9:.1f} GB; take more or larger gpus, or"
        f" {_way_out(recipe)}"
    )


def _way_out(recipe: StageRecipe) -> str:
    if recipe.training.precision == "fp32":
        return "set training.precision 'bf16'"
    if recipe.optimizer.type == "adamw":
        return "set optimizer.type 'adafactor'"
    return "set optimizer.momentum 'bf16'" if recipe.optimizer.momentum == "fp32" else "a smaller network"


def _divisors(batch: int, near: int) -> str:
    numbers = [number for number in range(1, batch + 1) if batch % number == 0]
    around = sorted(numbers, key=lambda number: abs(number - near))[:3]
    return " or ".join(str(number) for number in sorted(around))
