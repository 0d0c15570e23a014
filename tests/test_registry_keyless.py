"""Keyless signatures: whose they are, checked by sigstore itself against an instance of our own, without a network."""

import json
from pathlib import Path

import pytest

from infra.registry.layout import signature_key
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.registry.signing.signatures import SIGNED, sign_keyless, signed_by, verify
from infra.registry.signing.trust import SignatureRefused, Trust, identity_id
from infra.store.artifacts import ArtifactStore
from infra.store.folder import FolderStore
from model.config import GateRule
from tests.sigstore_instance import SigstoreInstance

RELEASE = "release/stable"
ISSUER = "https://token.actions.githubusercontent.com"
CI = "https://github.com/lab/stiv/.github/workflows/release.yml@refs/tags/v1"
OTHER = "https://github.com/lab/stiv/.github/workflows/test.yml@refs/heads/main"


@pytest.fixture(scope="module")
def instance() -> SigstoreInstance:
    return SigstoreInstance()


@pytest.fixture
def trust(instance: SigstoreInstance, tmp_path: Path) -> Trust:
    return trusting(instance, tmp_path)


def trusting(instance: SigstoreInstance, folder: Path, identity: str = CI, issuer: str = ISSUER) -> Trust:
    instance.roots(folder / "sigstore.json")
    lines = ["[[signer]]", 'name = "ci"', f'identity = "{identity}"', f'issuer = "{issuer}"']
    (folder / "trust.toml").write_text("\n".join([*lines, 'sigstore = "sigstore.json"', 'refs = ["release/"]']))
    return Trust.load(folder / "trust.toml")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return FolderStore(tmp_path / "store")


def publish(store: ArtifactStore, folder: Path, mark: str = "one") -> Manifest:
    (folder / mark).write_text(mark)
    rules = (GateRule(metric="loads", op=">=", bound=1),)
    return Registry(store).publish("engine", {"model.onnx": folder / mark}, rules=rules, metrics={"loads": 1})


def sign(instance: SigstoreInstance, manifest: Manifest, folder: Path, identity: str = CI) -> bytes:
    (folder / "signed").mkdir(exist_ok=True)
    (folder / "signed" / SIGNED).write_bytes(manifest.canonical())
    return instance.sign(folder / "signed", identity, ISSUER)


def keep(store: ArtifactStore, manifest: Manifest, signature: bytes, identity: str = CI) -> None:
    store.create(signature_key(manifest.digest, identity_id(identity, ISSUER)), signature)


def test_a_release_signed_by_the_trusted_identity_is_promoted_and_loaded(
    instance: SigstoreInstance, trust: Trust, store: ArtifactStore, tmp_path: Path
) -> None:
    registry, manifest = Registry(store, trust=trust), publish(store, tmp_path)
    with pytest.raises(SignatureRefused, match="'ci' has not signed it"):
        registry.promote(RELEASE, manifest.digest, who="ann", why="first")
    signature = sign(instance, manifest, tmp_path)
    assert signed_by(signature) == (CI, ISSUER)
    keep(store, manifest, signature)
    registry.promote(RELEASE, manifest.digest, who="ann", why="first")
    assert registry.verified(RELEASE) == manifest and verify(store, manifest, trust, RELEASE).name == "ci"


def test_another_identity_or_issuer_is_refused_wherever_its_signature_lies(
    instance: SigstoreInstance, trust: Trust, store: ArtifactStore, tmp_path: Path
) -> None:
    manifest = publish(store, tmp_path)
    signature = sign(instance, manifest, tmp_path, OTHER)
    keep(store, manifest, signature, OTHER)
    with pytest.raises(SignatureRefused, match="'ci' has not signed it"):
        verify(store, manifest, trust, RELEASE)
    keep(store, manifest, signature)
    with pytest.raises(SignatureRefused, match=r"'ci' does not hold: .*SANs do not match.*test.yml"):
        verify(store, manifest, trust, RELEASE)
    elsewhere = trusting(instance, tmp_path, issuer="https://gitlab.com")
    store.create(signature_key(manifest.digest, elsewhere.signer[0].key_id), sign(instance, manifest, tmp_path))
    with pytest.raises(SignatureRefused, match="'ci' does not hold"):
        verify(store, manifest, elsewhere, RELEASE)


def test_a_signature_of_another_manifest_by_another_instance_or_spoilt_is_refused(
    instance: SigstoreInstance, trust: Trust, store: ArtifactStore, tmp_path: Path
) -> None:
    one, two, three = (publish(store, tmp_path, mark) for mark in ("one", "two", "three"))
    keep(store, two, sign(instance, one, tmp_path))
    with pytest.raises(SignatureRefused, match="'ci' does not hold: Signature mismatch"):
        verify(store, two, trust, RELEASE)
    keep(store, one, sign(SigstoreInstance(), one, tmp_path))
    with pytest.raises(SignatureRefused, match="'ci' does not hold"):
        verify(store, one, trust, RELEASE)
    spoilt = json.loads(sign(instance, three, tmp_path))
    spoilt["verificationMaterial"]["tlogEntries"][0]["integratedTime"] = "1"
    keep(store, three, json.dumps(spoilt).encode())
    with pytest.raises(SignatureRefused, match="'ci' does not hold"):
        verify(store, three, trust, RELEASE)


def test_without_an_identity_nothing_is_signed_and_the_way_out_is_told(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI"):
        monkeypatch.delenv(name, raising=False)
    manifest = publish(store, tmp_path)
    with pytest.raises(ValueError, match=r"no identity to sign by: on GitHub give the job `permissions: id-token"):
        sign_keyless(store, manifest)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    with pytest.raises(ConnectionError, match=r"Sigstore did not sign: .*OIDC token permissions.*the job's rights"):
        sign_keyless(store, manifest)
    assert not store.list("signatures/")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (f'identity = "{CI}"', "'ci' has to have a public_key, or an identity and its issuer"),
        (f'identity = "{CI}"\nissuer = " "', "issuer: String should match"),
        (f'identity = "{CI}"\nissuer = "{ISSUER}"\npublic_key = "a.pub"', "a public_key, or an identity"),
        ('sigstore = "sigstore.json"\npublic_key = "a.pub"', "a public_key, or an identity"),
        (f'identity = "{CI}"\nissuer = "{ISSUER}"\nsigstore = "none.json"', "none.json: no such file"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "trust.toml").write_text(f'[[signer]]\nname = "ci"\n{lines}\n')
    with pytest.raises(ValueError, match=said):
        Trust.load(tmp_path / "trust.toml")


def test_roots_that_are_none_are_named(
    instance: SigstoreInstance, trust: Trust, store: ArtifactStore, tmp_path: Path
) -> None:
    manifest = publish(store, tmp_path)
    keep(store, manifest, sign(instance, manifest, tmp_path))
    (tmp_path / "sigstore.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sigstore.json: no roots of Sigstore"):
        verify(store, manifest, trust, RELEASE)
