"""Signatures of manifests by OpenSSF model-signing: made, stored beside the manifest, checked. Its one door.

A signature covers the bytes of the manifest, and these name every file and every parent by sha256: whoever loads
through the registry loads what was signed. It does not know who is trusted (`trust`) or when a signature is needed.
"""

import base64
import json
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from infra.registry import layout
from infra.registry.records import Manifest
from infra.registry.signing.trust import SignatureRefused, Signer, Trust, key_id, pem, read_private_key
from infra.store.artifacts import AlreadyExists, ArtifactNotFound, ArtifactStore

if TYPE_CHECKING:
    from model_signing import hashing

SIGNED = "manifest.json"
"""The one file that a signature covers, by the name the signature gives it."""
_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
"""Where Sigstore's certificates say who vouched for the identity."""
_BROKEN = (InvalidSignature, ValueError, LookupError, TypeError, AttributeError)
"""What model-signing raises on a signature that is wrong or no signature at all."""


def sign(store: ArtifactStore, manifest: Manifest, private_key: Path, password: bytes | None = None) -> str:
    """Sign a published manifest and store the signature; returns its key there. Signing again changes nothing."""
    from model_signing import signing

    public = read_private_key(private_key, password).public_key()
    key = layout.signature_key(manifest.digest, key_id(public))
    with _signable(manifest) as (folder, signature):
        # Typed as text, used as bytes: cryptography takes nothing else.
        config: Any = signing.Config().set_hashing_config(_hashing())
        config.use_elliptic_key_signer(private_key=private_key, password=password).sign(folder, signature)
        own = folder.with_name("own.pub")
        own.write_bytes(pem(public))
        _keep(store, manifest, key, signature.read_bytes(), Signer(name=private_key.name, public_key=own))
    return key


def sign_keyless(store: ArtifactStore, manifest: Manifest, *, sigstore: Path | None = None) -> tuple[str, Signer]:
    """Sign by the identity a CI's job has, or that a person shows in a browser; returns its key and who that is.

    Args:
        sigstore: roots and addresses of a Sigstore instance, as JSON; the public one unless said.
    """
    from model_signing import signing
    from sigstore import oidc
    from sigstore.errors import Error

    try:
        if not oidc.detect_credential() and not sys.stdin.isatty():
            raise ValueError(
                "no identity to sign by: on GitHub give the job `permissions: id-token: write`, on GitLab an"
                " `id_tokens:` entry SIGSTORE_ID_TOKEN; or sign at a terminal, or with --key"
            )
        with _signable(manifest) as (folder, path):
            config: Any = signing.Config().set_hashing_config(_hashing())
            config.use_sigstore_signer(use_ambient_credentials=True, trust_config=sigstore).sign(folder, path)
            signature = path.read_bytes()
    except Error as error:
        raise ConnectionError(f"Sigstore did not sign: {error}; check the network and the job's rights") from error
    identity, issuer = signed_by(signature)
    signer = Signer(name="keyless", identity=identity, issuer=issuer, sigstore=sigstore)
    key = layout.signature_key(manifest.digest, signer.key_id)
    _keep(store, manifest, key, signature, signer)
    return key, signer


def signed_by(signature: bytes) -> tuple[str, str]:
    """The identity in the certificate of a keyless signature, and who vouched for it; to be believed once verified."""
    from sigstore.models import Bundle

    certificate = Bundle.from_json(signature).signing_certificate
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (identity,) = (str(name.value) for name in names)
    issuer = certificate.extensions.get_extension_for_oid(_ISSUER).value
    assert isinstance(issuer, x509.UnrecognizedExtension)
    return identity, issuer.value.decode()


def _keep(store: ArtifactStore, manifest: Manifest, key: str, signature: bytes, signer: Signer) -> None:
    try:
        store.create(key, signature)
    except AlreadyExists:
        _check(manifest, store.read(key).data, signer)


def verify(store: ArtifactStore, manifest: Manifest, trust: Trust, ref: str | None = None) -> Signer:
    """The trusted signer whose signature of this manifest holds, for a load by `ref`; else `SignatureRefused`."""
    reasons: list[str] = []
    for signer in trust.signer:
        if not signer.may_sign(ref):
            reasons.append(f"'{signer.name}' may not sign for '{ref}'")
            continue
        key = layout.signature_key(manifest.digest, signer.key_id)
        try:
            _check(manifest, store.read(key).data, signer)
        except ArtifactNotFound:
            reasons.append(f"'{signer.name}' has not signed it")
        except SignatureRefused as error:
            reasons.append(str(error))
        else:
            return signer
    raise SignatureRefused(
        f"{manifest.kind} {manifest.digest} bears no trusted signature: {'; '.join(reasons)}; sign it with `stiv sign`,"
        " or trust who has signed it"
    )


def _check(manifest: Manifest, signature: bytes, signer: Signer) -> None:
    from sigstore.errors import Error

    with _signable(manifest) as (folder, path):
        path.write_bytes(signature)
        verifier = _verifier(signer)
        try:
            verifier.set_hashing_config(_hashing()).verify(folder, path)
            covered = _resources(signature)
        except (*_BROKEN, Error) as error:
            said = str(error) or type(error).__name__
            raise SignatureRefused(f"the signature by '{signer.name}' does not hold: {said}") from None
    # The library leaves out what a signature says to ignore; one that ignores the manifest must not pass.
    if covered != [(SIGNED, manifest.digest)]:
        raise SignatureRefused(f"the signature by '{signer.name}' covers {covered}, not this manifest")


def _verifier(signer: Signer) -> Any:
    from model_signing import verifying
    from sigstore.errors import Error

    config: Any = verifying.Config()
    if signer.public_key:
        return config.use_elliptic_key_verifier(public_key=signer.public_key)
    try:
        return config.use_sigstore_verifier(
            identity=signer.identity, oidc_issuer=signer.issuer, trust_config=signer.sigstore
        )
    except Error as error:
        raise ConnectionError(
            f"the roots of Sigstore, to check '{signer.name}' by, could not be fetched: {error}; name a file of them in"
            " the policy (`sigstore`)"
        ) from error
    except ValueError as error:
        raise ValueError(f"{signer.sigstore}: no roots of Sigstore: {error}") from None


def _resources(signature: bytes) -> list[tuple[str, str]]:
    envelope = json.loads(signature)["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return [(each["name"], each["digest"]) for each in statement["predicate"]["resources"]]


@contextmanager
def _signable(manifest: Manifest) -> Generator[tuple[Path, Path]]:
    """A folder that holds the manifest and nothing else, and a path for its signature."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "artifact"
        folder.mkdir()
        (folder / SIGNED).write_bytes(manifest.canonical())
        yield folder, Path(place) / "artifact.sig"


def _hashing() -> "hashing.Config":
    from model_signing import hashing

    return hashing.Config().use_file_serialization(hashing_algorithm="sha256")
