"""The registry: what was made (manifests), what is in use (refs), and the moves from one to the other.

It owns publishing, fetching and promotion in an artifact store; it knows neither whether that store is a folder or
S3, nor what the files of a manifest mean.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from pydantic import JsonValue

from infra.registry import copies, layout
from infra.registry.code import running_code
from infra.registry.gate import Champion, PromotionRefused, evaluate_gate
from infra.registry.records import Code, GateReport, Kind, Manifest, Ref, parse, parse_manifest
from infra.registry.signing.trust import SignatureRefused, Trust
from infra.registry.upkeep.claims import await_sweep, claimed
from infra.store.artifacts import (
    AlreadyExists,
    ArtifactCorrupt,
    ArtifactNotFound,
    ArtifactStore,
    Conflict,
    OutcomeUnknown,
    Versioned,
    all_of,
    blob_key,
    blob_of,
    check_key,
)
from model.config import ChampionRule, Rule
from model.measures.samples import SampleFigures


class Listener(Protocol):
    """Who hears of every moved ref."""

    def expect(self) -> None:
        """A ref is about to be moved."""

    def tell(self) -> None:
        """It was."""


class Registry:
    """Publish, resolve, fetch and promote artifacts of one store."""

    def __init__(self, store: ArtifactStore, *, code: Code | None = None, trust: Trust | None = None) -> None:
        self.store = store
        self.trust = trust
        self.listeners: Sequence[Listener] = ()
        self.code = code or running_code()

    def publish(
        self,
        kind: Kind,
        files: Mapping[str, Path],
        *,
        rules: Sequence[Rule] = (),
        recipe: Mapping[str, JsonValue] | None = None,
        metrics: Mapping[str, float] | None = None,
        parents: Mapping[str, str] | None = None,
        provenance: Mapping[str, JsonValue] | None = None,
    ) -> Manifest:
        """Store files, then the manifest that names them: until it stands, nothing was published.

        `rules` is the gate that every promotion of it must pass; without one it is there to be grown from, never
        promoted. Figures by sample are read from its file `evaluation/samples.json`.
        """
        self._check_sources(kind, files)
        self._check_parents(kind, parents or {})
        draft = Manifest(
            kind=kind,
            files={},
            recipe=None if recipe is None else dict(recipe),
            metrics=dict(metrics or {}),
            rules=tuple(rules),
            parents=dict(parents or {}),
            code=self.code,
            provenance=None if provenance is None else dict(provenance),
            created_at=datetime.now(UTC),
        )
        blobs = all_of({name: partial(blob_of, files[name]) for name in sorted(files)})
        manifest = draft.model_copy(update={"files": blobs})
        named = [blob_key(blob.digest) for blob in blobs.values()]
        with claimed(self.store, [*named, *map(layout.manifest_key, draft.parents.values())]):
            self._check_parents(kind, draft.parents)
            all_of({name: partial(self.store.put_file, files[name], blob) for name, blob in blobs.items()})
            self.store.create(layout.manifest_key(manifest.digest), manifest.canonical())
        return manifest

    def resolve(self, ref_or_digest: str) -> Manifest:
        """The manifest of that digest, or the one a ref points at; by a ref under `release/` only a signed one."""
        manifest = self.look_up(ref_or_digest)
        if layout.takes_only_signed(ref_or_digest):
            self._require_signature(manifest, ref_or_digest)
        return manifest

    def look_up(self, ref_or_digest: str) -> Manifest:
        """As `resolve`, to look at only: whether it is signed is not asked."""
        return self.manifest(ref_or_digest if layout.is_digest(ref_or_digest) else self.ref(ref_or_digest).digest)

    def verified(self, ref_or_digest: str) -> Manifest:
        """As `resolve`, for who is about to load it: where trusted keys are named, one of them must have signed it."""
        manifest = self.resolve(ref_or_digest)
        if self.trust is not None:
            self._require_signature(manifest, None if layout.is_digest(ref_or_digest) else ref_or_digest)
        return manifest

    def manifest(self, digest: str) -> Manifest:
        """The manifest of that name, its bytes verified."""
        key = layout.manifest_key(digest)
        return parse_manifest(digest, self.store.read(key), f"{self.store.url}/{key}")

    def fetch(self, manifest: Manifest, folder: Path) -> Path:
        """Copy every file to `folder`, which appears only complete and verified; a complete one is left as it is."""
        folder = folder.absolute()
        if copies.occupied(folder):
            copies.verify(manifest, folder)
            return folder
        temporary = folder.with_name(f".{uuid4().hex}.part")
        try:
            temporary.mkdir(parents=True)
            all_of({name: partial(self._fetch_file, manifest, name, temporary / name) for name in manifest.files})
            copies.put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        copies.verify_names(manifest, folder)
        return folder

    def samples(self, manifest: Manifest) -> SampleFigures | None:
        """What an artifact's evaluation measured sample by sample, or None if it was published without."""
        if layout.SAMPLE_FIGURES not in manifest.files:
            return None
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "samples.json"
            self._fetch_file(manifest, layout.SAMPLE_FIGURES, copy)
            return SampleFigures.loads(copy.read_bytes())

    def refs(self) -> tuple[str, ...]:
        """The names of all refs, sorted."""
        return tuple(layout.ref_name(key) for key in self.store.list(layout.REFS))

    def ref(self, name: str) -> Ref:
        """What a ref points at now, since when, and why."""
        key = layout.ref_key(name)
        try:
            return parse(Ref, self.store.read(key), key)
        except ArtifactNotFound as error:
            close = get_close_matches(name, self.refs(), n=3, cutoff=0.5)
            meant = f"; did you mean {' or '.join(repr(near) for near in close)}?" if close else ""
            raise ArtifactNotFound(f"no ref '{name}': {error}{meant}") from None

    def history(self, name: str) -> tuple[Ref, ...]:
        """Every move of a ref that took place, newest first."""
        return tuple(self._moves(self.ref(name)))

    def promote(self, ref: str, digest: str, *, who: str, why: str, override: str | None = None) -> Ref:
        """Point `ref` at a manifest if it passes its own gate; the same promotion again changes nothing.

        A rule beside the champion compares with what the ref points at now, and it is that very pointer which the
        move replaces. A failed gate needs `override`, a reason.

        Raises:
            SignatureRefused: the ref takes only signed artifacts. PromotionRefused: the gate did not pass; nothing is
            written. Conflict: somebody moved the ref meanwhile. OutcomeUnknown: the store was gone before it answered;
            the ref is the old or the new.
        """
        manifest = self.manifest(digest)
        if layout.takes_only_signed(ref):
            self._require_signature(manifest, ref)
        standing, present = self._standing(ref)
        if present and (present.digest, present.restores, present.override) == (digest, None, override):
            return present
        gate = self.judge(manifest, present)
        if not gate.passed and override is None:
            raise PromotionRefused(ref, manifest.digest, gate)
        move = _next(ref, present, digest=digest, who=who, why=why, gate=gate, override=override)
        return self._move(standing, move)

    def rollback(self, ref: str, *, who: str, why: str, to: int | None = None) -> Ref:
        """Point `ref` at what it pointed at before, or at generation `to`; a move like any other, kept in the log.

        Going back twice goes back two promotions: what counts as before is before the generation now in effect.
        """
        standing, present = self._standing(ref)
        if present is None:
            self.ref(ref)  # says that it is not there, and what is
            raise Conflict(f"'{ref}' appeared this moment; look at it and try again")
        moves = {move.generation: move for move in self._moves(present)}
        wanted = self._before(moves, present) if to is None else to
        target = moves.get(wanted)
        if target is None:
            raise ValueError(f"'{ref}' has no generation {wanted}; it has {sorted(moves)}")
        if target.digest == present.digest:
            raise ValueError(f"'{ref}' points at generation {wanted} already: {present.digest}")
        manifest = self.manifest(target.digest)
        if layout.takes_only_signed(ref):
            self._require_signature(manifest, ref)
        facts = {"gate": target.gate, "override": target.override, "restores": target.restores or target.generation}
        return self._move(standing, _next(ref, present, digest=target.digest, who=who, why=why, **facts))

    def judge(self, manifest: Manifest, present: Ref | None) -> GateReport:
        """An artifact's own rules held against its figures, beside those of what a ref points at, the champion."""
        beside = any(isinstance(rule, ChampionRule) for rule in manifest.rules)
        champion = self._champion(manifest, present) if beside else None
        samples = self.samples(manifest) if champion else None
        return evaluate_gate(manifest.rules, manifest.metrics, samples, champion)

    def _champion(self, manifest: Manifest, present: Ref | None) -> Champion | None:
        if present is None:
            return None
        digest: str | None = present.digest
        if digest == manifest.digest:  # an artifact is no rival of its own: it meets whom it met before
            digest = present.gate.champion
        return None if digest is None else Champion(digest, self.samples(self.manifest(digest)))

    def _before(self, moves: Mapping[int, Ref], present: Ref) -> int:
        effective = moves[present.restores or present.generation]
        while effective.previous_generation is not None:
            before = moves[effective.previous_generation]
            effective = moves[before.restores or before.generation]
            if effective.digest != present.digest:
                return effective.generation
        raise ValueError(f"'{present.name}' has nothing before generation {effective.generation} to go back to")

    def _move(self, standing: Versioned | None, move: Ref) -> Ref:
        """Write the move down, then make it: the swap of the pointer decides. Then it is told."""
        for listener in self.listeners:
            listener.expect()
        move = self._make(standing, move)
        for listener in self.listeners:
            listener.tell()
        return move

    def _make(self, standing: Versioned | None, move: Ref) -> Ref:
        key, move = layout.ref_key(move.name), self._log(move)
        # The entry of the log holds the artifact against a sweep that begins now; one under way may have it already.
        await_sweep(self.store, [layout.manifest_key(move.digest)])
        self._check_files(self.manifest(move.digest))
        try:
            if standing is None:
                self.store.create(key, move.canonical())
            else:
                self.store.swap(key, move.canonical(), standing.version)
        except OutcomeUnknown as error:
            return self._settled(standing, move, error)
        except (AlreadyExists, Conflict) as error:
            raise self._overtaken(move) from error
        return move

    def _settled(self, standing: Versioned | None, move: Ref, error: OutcomeUnknown) -> Ref:
        """The move whose answer was lost, if it was made: what stands there, and how it came there, tells."""
        in_doubt = OutcomeUnknown(
            f"'{move.name}' points at {move.digest} or still at what it did, which nobody can tell now: {error}; look"
            f" at `stiv history {move.name}` once the store answers, and promote again: twice changes nothing"
        )
        try:
            stored, present = self._standing(move.name)
            if present and any(made == move for made in self._moves(present)):
                return move
        except ConnectionError:
            raise in_doubt from error
        if (stored and stored.version) == (standing and standing.version):
            raise in_doubt from error
        raise self._overtaken(move) from None

    def _overtaken(self, move: Ref) -> Conflict:
        standing = self.ref(move.name).digest
        return Conflict(f"'{move.name}' was moved by somebody else meanwhile, to {standing}; look at it and try again")

    def _log(self, move: Ref) -> Ref:
        """Under the first free generation; a taken number is a move that was aborted or is under way."""
        while True:
            try:
                self.store.create(layout.log_key(move.name, move.generation), move.canonical())
                return move
            except AlreadyExists:
                move = move.model_copy(update={"generation": move.generation + 1})
            except OutcomeUnknown as error:
                raise ConnectionError(f"'{move.name}' was not moved: {error}") from error

    def _moves(self, move: Ref) -> Iterator[Ref]:
        yield move
        while move.previous_generation is not None:
            key = layout.log_key(move.name, move.previous_generation)
            move = parse(Ref, self.store.read(key), key)
            yield move

    def _standing(self, ref: str) -> tuple[Versioned | None, Ref | None]:
        key = layout.ref_key(ref)
        try:
            stored = self.store.read(key)
        except ArtifactNotFound:
            return None, None
        return stored, parse(Ref, stored, key)

    def _fetch_file(self, manifest: Manifest, name: str, to: Path) -> None:
        try:
            self.store.fetch_file(manifest.files[name].digest, to)
        except (ArtifactNotFound, ArtifactCorrupt) as error:
            raise type(error)(f"file '{name}' of {manifest.kind} {manifest.digest}: {error}") from error

    def _require_signature(self, manifest: Manifest, ref: str | None) -> None:
        from infra.registry.signing import signatures

        if self.trust is None:
            raise SignatureRefused(
                f"'{ref}' takes only signed artifacts, and no key is trusted here: name a policy with --trust or"
                " STIV_TRUST (docs/promote.md)"
            )
        signatures.verify(self.store, manifest, self.trust, ref)

    def _check_files(self, manifest: Manifest) -> None:
        keys = {name: blob_key(blob.digest) for name, blob in manifest.files.items()}
        with ThreadPoolExecutor(8) as pool:
            stands = dict(zip(keys, pool.map(self.store.exists, keys.values()), strict=True))
        missing = [name for name, there in stands.items() if not there]
        if missing:
            raise ArtifactNotFound(f"{manifest.kind} {manifest.digest} has lost its files {missing}; it cannot be used")

    def _check_sources(self, kind: Kind, files: Mapping[str, Path]) -> None:
        """All that can be wrong is found before the first byte is sent."""
        if not files:
            raise ValueError(f"a {kind} without files cannot be published")
        for name, path in files.items():
            check_key(name)
            if not path.is_file():
                raise ValueError(f"file '{name}' of the {kind} to publish: {path} is not a file")

    def _check_parents(self, kind: Kind, parents: Mapping[str, str]) -> None:
        for role, digest in parents.items():
            if not self.store.exists(layout.manifest_key(digest)):
                raise ArtifactNotFound(f"parent '{role}' of the {kind} to publish: no manifest {digest} is published")


def _next(name: str, present: Ref | None, **facts: object) -> Ref:
    """The move after the present one, made now."""
    return Ref.model_validate(
        {
            "name": name,
            "generation": present.generation + 1 if present else 1,
            "previous": present.digest if present else None,
            "previous_generation": present.generation if present else None,
            "when": datetime.now(UTC),
            **facts,
        }
    )
