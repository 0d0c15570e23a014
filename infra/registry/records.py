"""The registry's records: what a manifest, a ref and a gate's verdict say, and their one form as bytes.

It owns their fields and their JSON; it does not know where they are kept or who writes them.
"""

import hashlib
import json
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from infra.store.artifacts import ArtifactCorrupt, Blob, Versioned, check_digest, check_key
from model.config import Rule

Kind = Literal["checkpoint", "engine", "codec", "dataset"]
Digest = Annotated[str, AfterValidator(check_digest)]
FileName = Annotated[str, AfterValidator(check_key)]
NonBlank = Annotated[str, Field(pattern=r"\S")]
RecordT = TypeVar("RecordT", bound="Record")


class Record(BaseModel):
    """What the registry writes: immutable, and JSON that is the same to the byte whoever writes it."""

    # A diverged stage has NaN metrics and is still worth recording; JSON has no NaN but as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def canonical(self) -> bytes:
        tree = json.loads(self.model_dump_json())
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Comparison(Record):
    """A metric beside the champion's on the same samples; a positive difference is worse, whichever way is better."""

    samples: int
    worse_by: float
    """Mean difference."""
    low: float
    high: float
    """Ends of the paired bootstrap interval of that mean."""


class GateResult(Record):
    """One rule and what became of it; `value` is None where there was no number to compare."""

    rule: Rule
    value: float | None
    passed: bool
    reason: str
    comparison: Comparison | None = None
    """Of a rule beside the champion, where there was one to compare with."""


class GateReport(Record):
    """A gate's verdict: passed only if every rule did, and there was one."""

    passed: bool
    rules: tuple[GateResult, ...] = Field(min_length=1)
    champion: Digest | None = None
    """What the ref pointed at when rules beside the champion were judged."""

    @model_validator(mode="after")
    def _verdict_follows_from_the_rules(self) -> Self:
        if self.passed != all(rule.passed for rule in self.rules):
            raise ValueError(f"passed = {self.passed} contradicts the rules: {[rule.reason for rule in self.rules]}")
        return self


class Code(Record):
    """The code that made an artifact, as far as it is known where it ran."""

    version: str
    """Of the package."""
    commit: str | None = None
    """Of the git checkout it ran from; None of an installed package."""
    modified: bool | None = None
    """The checkout held changes that the commit does not; None where there is none."""


class Manifest(Record):
    """One published artifact: its files by name, where they come from and what it must hold to be promoted."""

    kind: Kind
    files: dict[FileName, Blob]
    recipe: dict[str, JsonValue] | None
    metrics: dict[str, float]
    rules: tuple[Rule, ...]
    """Its gate; an artifact without a rule cannot be promoted."""
    parents: dict[str, Digest]
    """Role -> digest of another manifest (`dataset`, `codec`, the `checkpoint` it grew from)."""
    code: Code
    provenance: dict[str, JsonValue] | None
    """What else is known of how it was built (in-toto and SLSA facts of an engine, say)."""
    created_at: AwareDatetime

    @property
    def digest(self) -> str:
        """Sha256 of the canonical JSON: the artifact's name."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(blob.size for blob in self.files.values())


class Ref(Record):
    """A named pointer at a manifest, and why it points there; also the entry of the log."""

    name: str
    generation: int = Field(ge=1)
    """Grows with every move; a number left out belongs to a move that was aborted."""
    digest: Digest
    previous: Digest | None
    previous_generation: int | None
    who: NonBlank
    why: NonBlank
    when: AwareDatetime
    gate: GateReport
    override: NonBlank | None
    """Why a failed gate was passed over; kept for ever."""
    restores: int | None = None
    """Generation that a rollback went back to; gate and override are that one's."""


def parse(record: type[RecordT], stored: Versioned, key: str) -> RecordT:
    try:
        return record.model_validate_json(stored.data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ArtifactCorrupt(f"{key} is not a {record.__name__.lower()}: {problems}") from None


def parse_manifest(digest: str, stored: Versioned, key: str) -> Manifest:
    """The manifest in those bytes, if they have the digest that names it."""
    found = hashlib.sha256(stored.data).hexdigest()
    if found != digest:
        raise ArtifactCorrupt(f"{key} is corrupt: expected sha256 {digest}, found {found}")
    return parse(Manifest, stored, key)
