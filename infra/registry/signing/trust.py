"""Who is trusted to sign what: the policy file, its keys and identities; it does not know how to check a signature."""

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

NonBlank = Annotated[str, Field(pattern=r"\S")]


class SignatureRefused(ValueError):
    """An artifact that must be signed bears no signature that is trusted here; nothing of it was loaded."""


class Signer(BaseModel):
    """One who is trusted: a key, or an identity that signs keylessly through Sigstore."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]+$")]
    public_key: Path | None = None
    """PEM file of an EC P-256 key; a relative path is from the policy's folder, here and below."""
    identity: NonBlank | None = None
    """Who signed, as Sigstore's certificate has it: an address, or a CI's workflow at a branch or tag."""
    issuer: NonBlank | None = None
    """URL of the OpenID Connect provider that vouched for the identity."""
    sigstore: Path | None = None
    """JSON file with the roots of a Sigstore instance; those of the public one, fetched and kept, unless said."""
    refs: tuple[str, ...] = ("",)
    """Refs it may sign for, by how they begin (`release/`); any unless said."""

    @model_validator(mode="after")
    def _a_key_or_an_identity(self) -> Self:
        keyless = (self.identity, self.issuer)
        if self.public_key and not any((*keyless, self.sigstore)):
            return self
        if self.public_key or not all(keyless):
            raise ValueError(f"'{self.name}' has to have a public_key, or an identity and its issuer")
        return self

    @property
    def key_id(self) -> str:
        """What its signatures are kept under."""
        if self.public_key:
            return key_id(read_public_key(self.public_key))
        assert self.identity and self.issuer
        return identity_id(self.identity, self.issuer)

    def placed(self, folder: Path) -> Self:
        """With its paths from that folder, and what they name looked at."""
        named = {"public_key": self.public_key, "sigstore": self.sigstore}
        signer = self.model_copy(update={name: folder / path for name, path in named.items() if path})
        if signer.public_key:
            read_public_key(signer.public_key)
        if signer.sigstore and not signer.sigstore.is_file():
            raise ValueError(f"{signer.sigstore}: no such file, though '{signer.name}' has it as roots of Sigstore")
        return signer

    def may_sign(self, ref: str | None) -> bool:
        """For a ref, or for an artifact that is named by its digest."""
        return ref is None or ref.startswith(self.refs)


class Trust(BaseModel):
    """The policy: every key and identity that is trusted, in a TOML file of `[[signer]]` tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signer: Annotated[tuple[Signer, ...], Field(min_length=1)]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a policy and its keys; what is wrong is a ValueError that names it."""
        try:
            tree = tomllib.loads(path.read_text())
            trust = cls.model_validate(tree)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid TOML: {error}") from None
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise ValueError(f"{path}: {problems}") from None
        return trust.model_copy(update={"signer": tuple(each.placed(path.parent) for each in trust.signer)})


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{path}: not a public key in PEM; `stiv keygen` writes one beside its private key") from None
    return _p256(key, path)


def read_private_key(path: Path, password: bytes | None) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password)
    except TypeError:
        wanted = (
            "is encrypted: set STIV_KEY_PASSWORD" if password is None else "is not encrypted: unset STIV_KEY_PASSWORD"
        )
        raise ValueError(f"{path}: the private key {wanted}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{path}: not a private key in PEM, or another password than STIV_KEY_PASSWORD") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path}: not an elliptic curve key; make one with `stiv keygen`")
    _p256(key.public_key(), path)
    return key


def make_keys(name: Path, password: bytes | None) -> tuple[Path, Path]:
    """A new pair: `NAME.key`, which only its owner may read, and `NAME.pub`; existing files are left alone."""
    private, public = name.with_name(name.name + ".key"), name.with_name(name.name + ".pub")
    for path in (private, public):
        if path.exists():
            raise ValueError(f"{path} exists; a key that signed something is not written over: choose another name")
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.touch(mode=0o600, exist_ok=False)
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(pem(key.public_key()))
    return private, public


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Sha256 of the key in PEM, as model-signing writes it into a signature."""
    return hashlib.sha256(pem(key)).hexdigest()


def identity_id(identity: str, issuer: str) -> str:
    """The same for an identity and who vouched for it."""
    return hashlib.sha256(f"{issuer}\n{identity}".encode()).hexdigest()


def pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _p256(key: object, path: Path) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError(f"{path}: not an EC P-256 key; make one with `stiv keygen`")
    return key
