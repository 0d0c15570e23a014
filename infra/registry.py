"""The registry: what was made (manifests), what is in use (refs), and the gate between the two.

It owns the layout `manifests/`, `refs/` and `reflog/` in an artifact store; it knows neither whether that store is a
folder or S3, nor what the files of a manifest mean.
"""

import errno
import hashlib
import json
import math
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from uuid import uuid4

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

from infra.store.artifacts import (
    AlreadyExists,
    ArtifactCorrupt,
    ArtifactNotFound,
    ArtifactStore,
    Blob,
    Conflict,
    Versioned,
    blob_of,
    check_digest,
    check_key,
)
from model.config import GateRule

Kind = Literal["checkpoint", "engine", "codec", "dataset"]
Digest = Annotated[str, AfterValidator(check_digest)]
FileName = Annotated[str, AfterValidator(check_key)]
NonBlank = Annotated[str, Field(pattern=r"\S")]
RecordT = TypeVar("RecordT", bound="Record")

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Record(BaseModel):
    """What the registry writes: immutable, and JSON that is the same to the byte whoever writes it."""

    # A diverged stage has NaN metrics and is still worth recording; JSON has no NaN but as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def canonical(self) -> bytes:
        tree = json.loads(self.model_dump_json())
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class GateResult(Record):
    """One rule and what became of it; `value` is None where there was no number to compare."""

    metric: str
    op: Literal["<", "<=", ">", ">="]
    bound: float
    value: float | None
    passed: bool
    reason: str


class GateReport(Record):
    """A gate's verdict: passed only if every rule did, and there was one."""

    passed: bool
    rules: tuple[GateResult, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _verdict_follows_from_the_rules(self) -> Self:
        if self.passed != all(rule.passed for rule in self.rules):
            raise ValueError(f"passed = {self.passed} contradicts the rules: {[rule.reason for rule in self.rules]}")
        return self


def evaluate_gate(rules: Sequence[GateRule], metrics: Mapping[str, float]) -> GateReport:
    """Hold the metrics against the rules; one that is missing or NaN fails its rule."""
    if not rules:
        raise ValueError("a gate without a rule could never refuse; give it at least one")
    results = tuple(_evaluate(rule, metrics.get(rule.metric)) for rule in rules)
    return GateReport(passed=all(result.passed for result in results), rules=results)


def _evaluate(rule: GateRule, value: float | None) -> GateResult:
    wanted = f"must be {rule.op} {rule.bound:g}"
    if value is None or math.isnan(value):
        value, passed, reason = None, False, f"{rule.metric} is {'missing' if value is None else 'nan'}, {wanted}"
    else:
        passed, reason = _HOLDS[rule.op](value, rule.bound), f"{rule.metric} = {value:.6g}, {wanted}"
    return GateResult(metric=rule.metric, op=rule.op, bound=rule.bound, value=value, passed=passed, reason=reason)


class PromotionRefused(ValueError):
    """A gate did not pass and nobody overrode it; the ref is as it was."""

    def __init__(self, ref: str, digest: str, gate: GateReport) -> None:
        failed = "; ".join(rule.reason for rule in gate.rules if not rule.passed)
        super().__init__(
            f"'{ref}' is not moved to {digest}: {failed}; train on, or promote with an override that says why"
        )
        self.gate = gate


class Manifest(Record):
    """One published artifact: its files by name and where they come from."""

    kind: Kind
    files: dict[FileName, Blob]
    recipe: dict[str, JsonValue] | None
    metrics: dict[str, float]
    parents: dict[str, Digest]
    """Role -> digest of another manifest (`dataset`, `codec`, the `checkpoint` it grew from)."""
    code_version: str
    created_at: AwareDatetime

    @property
    def digest(self) -> str:
        """Sha256 of the canonical JSON: the artifact's name."""
        return hashlib.sha256(self.canonical()).hexdigest()


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


class Registry:
    """Publish, resolve, fetch and promote artifacts of one store."""

    def __init__(self, store: ArtifactStore, *, code_version: str | None = None) -> None:
        self.store = store
        self.code_version = code_version or version("stiv-platform")

    def publish(
        self,
        kind: Kind,
        files: Mapping[str, Path],
        *,
        recipe: Mapping[str, JsonValue] | None = None,
        metrics: Mapping[str, float] | None = None,
        parents: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Store files, then the manifest that names them: until it stands, nothing was published."""
        self._check_sources(kind, files, parents or {})
        draft = Manifest(
            kind=kind,
            files={},
            recipe=None if recipe is None else dict(recipe),
            metrics=dict(metrics or {}),
            parents=dict(parents or {}),
            code_version=self.code_version,
            created_at=datetime.now(UTC),
        )
        manifest = draft.model_copy(
            update={"files": {name: self.store.put_file(files[name]) for name in sorted(files)}}
        )
        self.store.create(_manifest_key(manifest.digest), manifest.canonical())
        return manifest

    def resolve(self, ref_or_digest: str) -> Manifest:
        """The manifest of that digest, or the one a ref points at."""
        if _is_digest(ref_or_digest):
            return self._manifest(ref_or_digest)
        return self._manifest(self.ref(ref_or_digest).digest)

    def fetch(self, manifest: Manifest, folder: Path) -> Path:
        """Copy every file to `folder`, which appears only complete and verified; a complete one is left as it is."""
        folder = folder.absolute()
        if _occupied(folder):
            _verify(manifest, folder)
            return folder
        temporary = folder.with_name(f".{uuid4().hex}.part")
        try:
            temporary.mkdir(parents=True)
            for name, blob in sorted(manifest.files.items()):
                self._fetch_file(manifest, name, blob.digest, temporary / name)
            _put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _verify_names(manifest, folder)
        return folder

    def ref(self, name: str) -> Ref:
        """What a ref points at now, since when, and why."""
        return _parse(Ref, self.store.read(_ref_key(name)), _ref_key(name))

    def history(self, name: str) -> tuple[Ref, ...]:
        """Every move of a ref that took place, newest first."""
        return tuple(self._moves(name))

    def promote(
        self, ref: str, digest: str, gate: GateReport, *, who: str, why: str, override: str | None = None
    ) -> Ref:
        """Point `ref` at a manifest if its gate passed; the same promotion again changes nothing.

        A failed gate needs `override`, a reason. `Conflict` means somebody moved the ref meanwhile.
        """
        key = _ref_key(ref)
        manifest = self._manifest(digest)
        if not gate.passed and override is None:
            raise PromotionRefused(ref, manifest.digest, gate)
        standing = self._standing(key)
        present = None if standing is None else _parse(Ref, standing, key)
        if present and (present.digest, present.gate, present.override) == (digest, gate, override):
            return present
        move = Ref(
            name=ref,
            generation=present.generation + 1 if present else 1,
            digest=digest,
            previous=present.digest if present else None,
            previous_generation=present.generation if present else None,
            who=who,
            why=why,
            when=datetime.now(UTC),
            gate=gate,
            override=override,
        )
        return self._move(key, standing, self._log(move))

    def _log(self, move: Ref) -> Ref:
        """Write the move down before it is made, under the first free generation.

        A taken number is a move that was aborted or is under way; the swap of the pointer decides.
        """
        while True:
            try:
                self.store.create(_log_key(move.name, move.generation), move.canonical())
                return move
            except AlreadyExists:
                move = move.model_copy(update={"generation": move.generation + 1})

    def _move(self, key: str, standing: Versioned | None, move: Ref) -> Ref:
        try:
            if standing is None:
                self.store.create(key, move.canonical())
            else:
                self.store.swap(key, move.canonical(), standing.version)
        except (AlreadyExists, Conflict) as error:
            raise Conflict(
                f"'{move.name}' was moved by somebody else meanwhile, to {self.ref(move.name).digest}; look at it"
                " and promote again"
            ) from error
        return move

    def _moves(self, name: str) -> Iterator[Ref]:
        move = self.ref(name)
        yield move
        while move.previous_generation is not None:
            key = _log_key(name, move.previous_generation)
            move = _parse(Ref, self.store.read(key), key)
            yield move

    def _standing(self, key: str) -> Versioned | None:
        try:
            return self.store.read(key)
        except ArtifactNotFound:
            return None

    def _manifest(self, digest: str) -> Manifest:
        key = _manifest_key(digest)
        stored = self.store.read(key)
        found = hashlib.sha256(stored.data).hexdigest()
        if found != digest:
            raise ArtifactCorrupt(f"{self.store.url}/{key} is corrupt: expected sha256 {digest}, found {found}")
        return _parse(Manifest, stored, key)

    def _fetch_file(self, manifest: Manifest, name: str, digest: str, to: Path) -> None:
        try:
            self.store.fetch_file(digest, to)
        except (ArtifactNotFound, ArtifactCorrupt) as error:
            raise type(error)(f"file '{name}' of {manifest.kind} {manifest.digest}: {error}") from error

    def _check_sources(self, kind: Kind, files: Mapping[str, Path], parents: Mapping[str, str]) -> None:
        """All that can be wrong is found before the first byte is sent."""
        if not files:
            raise ValueError(f"a {kind} without files cannot be published")
        for name, path in files.items():
            check_key(name)
            if not path.is_file():
                raise ValueError(f"file '{name}' of the {kind} to publish: {path} is not a file")
        for role, digest in parents.items():
            if not self.store.exists(_manifest_key(digest)):
                raise ArtifactNotFound(f"parent '{role}' of the {kind} to publish: no manifest {digest} is published")


def _put_in_place(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        # Another process that fetched the same was quicker; what it put there is looked at next.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _occupied(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _verify_names(manifest: Manifest, folder: Path) -> None:
    missing = [name for name in sorted(manifest.files) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is in use and is no copy of {manifest.kind} {manifest.digest}: it lacks {missing};"
            " fetch to another folder"
        )


def _verify(manifest: Manifest, folder: Path) -> None:
    _verify_names(manifest, folder)
    for name, blob in sorted(manifest.files.items()):
        found = blob_of(folder / name)
        if found != blob:
            raise ArtifactCorrupt(
                f"{folder / name} is not the file of {manifest.kind} {manifest.digest}: expected sha256 {blob.digest},"
                f" found {found.digest}; delete the folder and fetch it again"
            )


def _parse(record: type[RecordT], stored: Versioned, key: str) -> RecordT:
    try:
        return record.model_validate_json(stored.data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ArtifactCorrupt(f"{key} is not a {record.__name__.lower()}: {problems}") from None


def _is_digest(text: str) -> bool:
    try:
        return check_digest(text) == text
    except ValueError:
        return False


def _manifest_key(digest: str) -> str:
    return f"manifests/{check_digest(digest)}.json"


def _ref_key(name: str) -> str:
    if _is_digest(name):
        raise ValueError(f"'{name}' is a digest; give the ref a name such as t2v/promoted")
    return f"refs/{check_key(name)}.json"


def _log_key(name: str, generation: int) -> str:
    return f"reflog/{check_key(name)}/{generation:08d}.json"
