"""Signed releases: refs under `release/`, real key files, and everything that somebody could tamper with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.registry.layout import signature_key
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.registry.signing.signatures import sign, verify
from infra.registry.signing.trust import SignatureRefused, Trust, make_keys
from infra.store.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore, blob_key
from infra.store.folder import FolderStore
from model.config import GateRule

RULES = (GateRule(metric="loads", op=">=", bound=1),)
RELEASE = "release/stable"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`release` may sign for release/ only, `team` for anything but releases, `other` is nobody."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("release", "team", "other"):
        make_keys(folder / name, b"secret" if name == "release" else None)
    tables = [("release", "release/"), ("team", "engine/")]
    text = "".join(f'[[signer]]\nname = "{who}"\npublic_key = "{who}.pub"\nrefs = ["{ref}"]\n' for who, ref in tables)
    (folder / "trust.toml").write_text(text)
    return folder


@pytest.fixture
def trust(keys: Path) -> Trust:
    return Trust.load(keys / "trust.toml")


def publish(store: ArtifactStore, folder: Path, mark: str = "one") -> Manifest:
    path = folder / mark
    path.write_text(f"weights {mark}")
    return Registry(store).publish("engine", {"model.onnx": path}, rules=RULES, metrics={"loads": 1})


def edit(store: ArtifactStore, key: str, change: Callable[[bytes], bytes]) -> None:
    stored = store.read(key)
    store.swap(key, change(stored.data), stored.version)


def test_a_release_is_signed_promoted_and_loaded(
    store: ArtifactStore, keys: Path, trust: Trust, tmp_path: Path
) -> None:
    registry = Registry(store, trust=trust)
    manifest = publish(store, tmp_path)
    with pytest.raises(SignatureRefused, match="'release' has not signed it; 'team' may not sign for 'release/stable'"):
        registry.promote(RELEASE, manifest.digest, who="ann", why="first")
    with pytest.raises(ArtifactNotFound):
        registry.ref(RELEASE)
    key = sign(store, manifest, keys / "release.key", b"secret")
    assert key == signature_key(manifest.digest, trust.signer[0].key_id) and store.exists(key)
    registry.promote(RELEASE, manifest.digest, who="ann", why="first")
    assert registry.verified(RELEASE) == registry.resolve(RELEASE) == manifest
    assert (registry.fetch(manifest, tmp_path / "out") / "model.onnx").read_text() == "weights one"
    assert verify(store, manifest, trust, RELEASE).name == "release"


def test_a_release_is_neither_promoted_nor_loaded_where_nobody_is_trusted(
    keys: Path, trust: Trust, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = publish(store, tmp_path)
    sign(store, manifest, keys / "release.key", b"secret")
    with pytest.raises(SignatureRefused, match="no key is trusted here: name a policy with --trust or STIV_TRUST"):
        Registry(store).promote(RELEASE, manifest.digest, who="ann", why="first")
    Registry(store, trust=trust).promote(RELEASE, manifest.digest, who="ann", why="first")
    with pytest.raises(SignatureRefused, match="no key is trusted here"):
        Registry(store).resolve(RELEASE)
    assert Registry(store).look_up(RELEASE) == manifest, "to look at it needs no trust"


def test_with_a_policy_whatever_is_loaded_must_be_signed(keys: Path, trust: Trust, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    registry, manifest = Registry(store, trust=trust), publish(store, tmp_path)
    registry.promote("engine/candidate", manifest.digest, who="ann", why="first")
    for name in ("engine/candidate", manifest.digest):
        with pytest.raises(SignatureRefused, match="'team' has not signed it"):
            registry.verified(name)
    sign(store, manifest, keys / "team.key")
    assert registry.verified("engine/candidate") == registry.verified(manifest.digest) == manifest
    assert Registry(store).verified("engine/candidate") == manifest, "without a policy nothing is asked"


def test_a_signature_by_somebody_else_or_of_something_else_is_none(keys: Path, trust: Trust, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    one, two = publish(store, tmp_path), publish(store, tmp_path, "two")
    sign(store, one, keys / "other.key")
    with pytest.raises(SignatureRefused, match="'release' has not signed it"):
        verify(store, one, trust, RELEASE)
    place = sign(store, one, keys / "release.key", b"secret")
    moved = signature_key(two.digest, trust.signer[0].key_id)
    store.create(moved, store.read(place).data)
    with pytest.raises(SignatureRefused, match="does not hold: Signature mismatch"):
        verify(store, two, trust, RELEASE)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"payload":"e', b'"payload":"f'),
        lambda data: json.dumps({**json.loads(data), "dsseEnvelope": {}}).encode(),
        lambda data: data[:-20],
        lambda data: b"{}",
        lambda data: b"",
    ],
)
def test_a_tampered_signature_is_refused(
    keys: Path, trust: Trust, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = publish(store, tmp_path)
    edit(store, sign(store, manifest, keys / "release.key", b"secret"), change)
    with pytest.raises(SignatureRefused, match="the signature by 'release' does not hold"):
        verify(store, manifest, trust, RELEASE)


def test_a_tampered_manifest_or_file_of_a_signed_artifact_is_refused(keys: Path, trust: Trust, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    registry, manifest = Registry(store, trust=trust), publish(store, tmp_path)
    sign(store, manifest, keys / "release.key", b"secret")
    registry.promote(RELEASE, manifest.digest, who="ann", why="first")
    key = f"manifests/{manifest.digest}.json"
    edit(store, key, lambda data: data.replace(b'"loads":1.0', b'"loads":2.0'))
    with pytest.raises(ArtifactCorrupt, match="expected sha256"):
        registry.verified(RELEASE)
    edit(store, key, lambda _: manifest.canonical())
    edit(store, blob_key(manifest.files["model.onnx"].digest), lambda data: data.replace(b"one", b"two"))
    with pytest.raises(ArtifactCorrupt, match=r"file 'model.onnx' of engine"):
        registry.fetch(registry.verified(RELEASE), tmp_path / "out")


def test_a_key_that_is_no_longer_trusted_ends_its_releases(keys: Path, trust: Trust, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    registry = Registry(store, trust=trust)
    one, two = publish(store, tmp_path), publish(store, tmp_path, "two")
    for each in (one, two):
        sign(store, each, keys / "release.key", b"secret")
        registry.promote(RELEASE, each.digest, who="ann", why="next")
    registry.trust = Trust(signer=(trust.signer[1],))
    for attempt in (lambda: registry.resolve(RELEASE), lambda: registry.rollback(RELEASE, who="ann", why="back")):
        with pytest.raises(SignatureRefused):
            attempt()


def test_signing_twice_keeps_the_first_signature(keys: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = publish(store, tmp_path)
    place = sign(store, manifest, keys / "team.key")
    before = store.read(place)
    assert sign(store, manifest, keys / "team.key") == place and store.read(place) == before
    edit(store, place, lambda data: data.replace(b'"payload":"e', b'"payload":"f'))
    with pytest.raises(SignatureRefused, match=r"the signature by 'team.key' does not hold"):
        sign(store, manifest, keys / "team.key")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "signer: Field required"),
        ("[[signer]]\nname = 'a'", "'a' has to have a public_key, or an identity"),
        ("[[signer]]\nname = 'a'\npublic_key = 'release.key'", "release.key: not a public key in PEM"),
        ("[[signer]]\nname = 'a'\npublic_key = 'trust.toml'", "not a public key"),
        ("[[signer]]\nname = 'a'\npublic_key = 'other.pub'\nref = 'x'", "signer.0.ref: Extra inputs"),
        ("signer = ", "not valid TOML"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(keys: Path, text: str, said: str) -> None:
    policy = keys / "odd.toml"
    policy.write_text(text)
    with pytest.raises(ValueError, match=said):
        Trust.load(policy)


def test_keys_are_private_kept_and_say_what_password_they_want(keys: Path, tmp_path: Path) -> None:
    assert (keys / "release.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match=r"release.key exists; a key that signed something is not written over"):
        make_keys(keys / "release", None)
    store = FolderStore(tmp_path / "store")
    manifest = publish(store, tmp_path)
    for name, password, said in (
        ("release.key", None, "is encrypted: set STIV_KEY_PASSWORD"),
        ("release.key", b"wrong", "another password"),
        ("team.key", b"any", "is not encrypted: unset STIV_KEY_PASSWORD"),
        ("team.pub", None, "not a private key"),
    ):
        with pytest.raises(ValueError, match=said):
            sign(store, manifest, keys / name, password)
