"""CurriculumFlow: the progressive training of STIV as a Metaflow graph, a step a stage (paper 2.4, Figure 4).

    python -m flows.curriculum_flow run --recipe tiny
    python -m flows.curriculum_flow resume

Each training step is a controller: it asks `infra.launch` for a gang of ranks and follows it. Nothing is computed here.
"""

# Metaflow has no types: steps, parameters and artifacts are attributes made at run time.
# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportUntypedFunctionDecorator=false

import os
from pathlib import Path

from metaflow import FlowSpec, Parameter, card, current, step

from flows.cards import TrainingCard
from flows.catalog import recipe_path
from flows.results import stage_result
from infra.registry.names import CODEC, DATASET, promoted
from infra.registry.opening import open_registry
from model.recipe import load

STAGES = ("t2i", "t2v", "ti2v")


class CurriculumFlow(FlowSpec):
    """Train a curriculum stage by stage; every stage grows from the promoted checkpoint of the one before."""

    recipe = Parameter("recipe", default="tiny", help="built-in curriculum or path of a curriculum.toml")
    overrides = Parameter("set", default="", help="stage.section.key=value, several separated by ';' (stage may be *)")
    store = Parameter("store", default="runs/store", help="artifact store: a folder or s3://bucket/prefix")
    work = Parameter("work", default="runs/work", help="folder for data, checkpoints and logs of this machine")

    @step
    def start(self):
        """Read the recipe and make sure that data set and codec are promoted, before anything is trained."""
        overrides = [part for part in str(self.overrides).split(";") if part.strip()]
        self.curriculum = load(recipe_path(str(self.recipe)), overrides)
        names = tuple(stage.name for stage in self.curriculum.stages)
        if names != STAGES:
            raise ValueError(f"recipe '{self.recipe}' has stages {names}; this flow runs {STAGES}, in that order")
        registry = self._registry()
        self.inputs = {ref: registry.resolve(ref).digest for ref in (DATASET, CODEC)}
        # Kept as an artifact: a resumed run goes on in the folder of the run that it resumes.
        self.run_folder = str(Path(str(self.work)).absolute() / f"{self.curriculum.name}-{current.run_id}")
        self.results, self.seconds = {}, {}
        self.next(self.t2i)

    @card(type="blank", id="training", refresh_interval=20)
    @step
    def t2i(self):
        """Text to image: appearance, from scratch."""
        self._train("t2i")
        self.next(self.t2v)

    @card(type="blank", id="training", refresh_interval=20)
    @step
    def t2v(self):
        """Text to video: motion; the image network grows temporal attention and video patches."""
        self._train("t2v")
        self.next(self.ti2v)

    @card(type="blank", id="training", refresh_interval=20)
    @step
    def ti2v(self):
        """Text and image to video: the first frame is given, or dropped so that text alone still works."""
        self._train("ti2v")
        self.next(self.end)

    @step
    def end(self):
        """Say what was promoted."""
        for name, result in self.results.items():
            print(f"{promoted(name)} -> {result.digest}")

    def _train(self, name):
        # Here, since Metaflow runs a flow's imports anew for every task and card refresh, and this one is PyTorch.
        from infra.launch.stage import run_stage

        recipe = self.curriculum.stage(name)
        board = TrainingCard(current.card["training"], recipe)
        outcome = run_stage(
            recipe, self._registry(), Path(self.run_folder), who=str(current.username), on_progress=board.update
        )
        board.finish(outcome)
        # A new dict: what an earlier step kept stays as it was.
        self.results = {**self.results, name: stage_result(recipe, outcome)}
        self.seconds = {**self.seconds, name: outcome.seconds}

    def _registry(self):
        return open_registry(str(self.store), os.environ)


if __name__ == "__main__":
    CurriculumFlow()
