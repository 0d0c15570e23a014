"""The registry: what was made (manifests), what is in use (refs), and the moves from one to the other.

It owns publishing, fetching and promotion in an artifact store; it knows neither whether that store is a folder or
S3, nor what the files of a manifest mean.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from pydantic import JsonValue

from infra.artifacts import (
    AlreadyExists,
    ArtifactCorrupt,
    ArtifactNotFound,
    ArtifactStore,
    Conflict,
    Versioned,
    check_key,
)
from infra.registry import copies
from infra.registry.gate import PromotionRefused
from infra.registry.layout import is_digest, log_key, manifest_key, ref_key
from infra.registry.records import GateReport, Kind, Manifest, Ref, parse


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
        self.store.create(manifest_key(manifest.digest), manifest.canonical())
        return manifest

    def resolve(self, ref_or_digest: str) -> Manifest:
        """The manifest of that digest, or the one a ref points at."""
        if is_digest(ref_or_digest):
            return self._manifest(ref_or_digest)
        return self._manifest(self.ref(ref_or_digest).digest)

    def fetch(self, manifest: Manifest, folder: Path) -> Path:
        """Copy every file to `folder`, which appears only complete and verified; a complete one is left as it is."""
        folder = folder.absolute()
        if copies.occupied(folder):
            copies.verify(manifest, folder)
            return folder
        temporary = folder.with_name(f".{uuid4().hex}.part")
        try:
            temporary.mkdir(parents=True)
            for name, blob in sorted(manifest.files.items()):
                self._fetch_file(manifest, name, blob.digest, temporary / name)
            copies.put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        copies.verify_names(manifest, folder)
        return folder

    def ref(self, name: str) -> Ref:
        """What a ref points at now, since when, and why."""
        return parse(Ref, self.store.read(ref_key(name)), ref_key(name))

    def history(self, name: str) -> tuple[Ref, ...]:
        """Every move of a ref that took place, newest first."""
        return tuple(self._moves(name))

    def promote(
        self, ref: str, digest: str, gate: GateReport, *, who: str, why: str, override: str | None = None
    ) -> Ref:
        """Point `ref` at a manifest if its gate passed; the same promotion again changes nothing.

        A failed gate needs `override`, a reason. `Conflict` means somebody moved the ref meanwhile.
        """
        key = ref_key(ref)
        manifest = self._manifest(digest)
        if not gate.passed and override is None:
            raise PromotionRefused(ref, manifest.digest, gate)
        standing = self._standing(key)
        present = None if standing is None else parse(Ref, standing, key)
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
                self.store.create(log_key(move.name, move.generation), move.canonical())
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
            key = log_key(name, move.previous_generation)
            move = parse(Ref, self.store.read(key), key)
            yield move

    def _standing(self, key: str) -> Versioned | None:
        try:
            return self.store.read(key)
        except ArtifactNotFound:
            return None

    def _manifest(self, digest: str) -> Manifest:
        key = manifest_key(digest)
        stored = self.store.read(key)
        found = hashlib.sha256(stored.data).hexdigest()
        if found != digest:
            raise ArtifactCorrupt(f"{self.store.url}/{key} is corrupt: expected sha256 {digest}, found {found}")
        return parse(Manifest, stored, key)

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
            if not self.store.exists(manifest_key(digest)):
                raise ArtifactNotFound(f"parent '{role}' of the {kind} to publish: no manifest {digest} is published")
