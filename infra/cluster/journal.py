"""What a gang tells of itself through the artifact store: how far it is, and what came out.

It owns the objects `gangs/NAME/`; pods write them and controllers read them. It does not know what a stage is.
"""

from typing import Annotated

from pydantic import Field

from infra.registry.records import Digest, Record, parse
from infra.store.artifacts import AlreadyExists, ArtifactNotFound, ArtifactStore, Conflict

NonNegative = Annotated[int, Field(ge=0)]


class Progress(Record):
    """Of the first node, every few seconds."""

    number: NonNegative
    """Grows with every note, so that no two are the same."""
    step: NonNegative
    total_steps: NonNegative
    checkpoint_step: NonNegative
    """Of the newest durable checkpoint."""
    loss: float | None = None
    samples_per_second: float | None = None
    save_seconds: float | None = None
    """The longest save so far."""
    seconds_left: float | None = None


class Outcome(Record):
    """What a gang that succeeded has published."""

    checkpoint: Digest


class GangJournal:
    """The notes of the gang of one name."""

    def __init__(self, store: ArtifactStore, name: str) -> None:
        self._store = store
        self._progress, self._outcome = f"gangs/{name}/progress.json", f"gangs/{name}/outcome.json"

    def tell(self, progress: Progress) -> None:
        """Replace the last note; one that another pod wrote at the same moment stands."""
        try:
            standing = self._store.read(self._progress)
            number = parse(Progress, standing, self._progress).number + 1
            note = progress.model_copy(update={"number": number}).canonical()
            self._store.swap(self._progress, note, standing.version)
        except ArtifactNotFound:
            self._store.create(self._progress, progress.canonical())
        except (Conflict, AlreadyExists):
            return

    def progress(self) -> Progress | None:
        try:
            return parse(Progress, self._store.read(self._progress), self._progress)
        except ArtifactNotFound:
            return None

    def close(self, outcome: Outcome) -> Outcome:
        """Say what was published; what an earlier attempt said already stands, and is returned."""
        try:
            self._store.create(self._outcome, outcome.canonical())
        except AlreadyExists:
            return self.outcome() or outcome
        return outcome

    def outcome(self) -> Outcome | None:
        try:
            return parse(Outcome, self._store.read(self._outcome), self._outcome)
        except ArtifactNotFound:
            return None
