"""What a gang is asked to do: the stage manifest that names it, and the file its pods read.

It owns both forms and the names made of them; it does not know what objects they become.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from infra.cluster.config import ClusterConfig, HangConfig, with_ranks
from model.config import RESUMABLE, Config, Positive
from model.recipe import StageRecipe

_NAME_LENGTH = 30
_DIGEST_LENGTH = 10


class NodeOrder(Config):
    """What every pod of a gang reads: its part of the stage follows from its own index."""

    name: str
    run: str
    """Folder of the run below the claim, and its name where checkpoints are kept."""
    recipe: StageRecipe
    """With the number of ranks of this very gang."""
    inputs: dict[str, str]
    """Digests by role, as `infra.launch.stage.fetch_inputs` gives them: what the pods must find."""
    store: str
    checkpoints: str | None
    nodes: Positive
    ranks_per_node: Positive
    metrics_port: int
    grace_seconds: Positive
    hang: HangConfig = Field(default_factory=HangConfig)


class Carried(Config):
    """What a JobSet inherits from those before it that bore its name, and where the run last got further."""

    restarts: Annotated[int, Field(ge=0)] = 0
    """Of earlier JobSets."""
    crashes: Annotated[int, Field(ge=0)] = 0
    step: Annotated[int, Field(ge=0)] = 0
    """Of the newest checkpoint that was seen."""
    restarts_at_step: Annotated[int, Field(ge=0)] = 0
    """All restarts until that was seen."""


@dataclass(slots=True, frozen=True)
class GangRequest:
    """A stage on a cluster: what is to be trained, from what, where."""

    recipe: StageRecipe
    inputs: dict[str, str]
    cluster: ClusterConfig

    @property
    def manifest(self) -> dict[str, Any]:
        """All that decides what comes out: two requests that are equal in this are one gang."""
        return {**self._training(), "image": self.cluster.image, "rules": self._judged()}

    @property
    def digest(self) -> str:
        return _digest(self.manifest)

    @property
    def name(self) -> str:
        """Of every object; the same for the same manifest."""
        return f"{self._stem}-{self.digest[:_DIGEST_LENGTH]}"

    @property
    def run(self) -> str:
        """Of the run folder: a newer image or another gate goes on from the same checkpoints."""
        return f"{self._stem}-{_digest(self._training())[:_DIGEST_LENGTH]}"

    def order(self, nodes: int, grace_seconds: int) -> NodeOrder:
        """For a gang of so many nodes."""
        wanted, ranks = self.cluster.layout(self.recipe)
        recipe = self.recipe if nodes == wanted else with_ranks(self.recipe, nodes * ranks)
        return NodeOrder(
            name=self.name,
            run=self.run,
            recipe=recipe,
            inputs=self.inputs,
            store=self.cluster.store,
            checkpoints=self.cluster.storage.checkpoints,
            nodes=nodes,
            ranks_per_node=ranks,
            metrics_port=self.cluster.metrics_port,
            grace_seconds=grace_seconds,
            hang=self.cluster.hang,
        )

    @property
    def _stem(self) -> str:
        return self.recipe.name.replace("_", "-")[:_NAME_LENGTH].strip("-")

    def _training(self) -> dict[str, Any]:
        tree = self.recipe.model_dump(
            mode="json",
            exclude={"sampling": True, "evaluation": True, "export": True, "gate": True, "training": set(RESUMABLE)},
        )
        return {"recipe": tree, "inputs": self.inputs, "store": self.cluster.store}

    def _judged(self) -> dict[str, Any]:
        return self.recipe.model_dump(mode="json", include={"sampling", "evaluation", "gate"})


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
