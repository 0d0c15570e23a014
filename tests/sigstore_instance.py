"""A Sigstore of our own: authority, certificate log and transparency log, in memory, that vouches for anybody.

It stands for Fulcio, Rekor and their OpenID Connect provider, which a test cannot reach, and owns the forms in which
they answer; who checks is `sigstore` itself, by the roots that `roots` writes.
"""

import base64
import hashlib
import json
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from model_signing import hashing  # pyright: ignore[reportMissingTypeStubs]

ISSUER_OID, SCT_OID = "1.3.6.1.4.1.57264.1.1", "1.3.6.1.4.1.11129.2.4.2"
ORIGIN = "rekor.test"


class SigstoreInstance:
    def __init__(self) -> None:
        self._authority, self._ct, self._rekor = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self._now = datetime.now(UTC).replace(microsecond=0)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
        usage = _usage(key_cert_sign=True, crl_sign=True)
        self._root = (
            self._certificate(name, name, self._authority.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._authority.public_key()), critical=False)
            .sign(self._authority, hashes.SHA256())
        )

    def roots(self, path: Path) -> Path:
        """A trust configuration of this instance."""
        tree = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [self._log(self._rekor)],
                "ctlogs": [self._log(self._ct)],
                "certificateAuthorities": [
                    {
                        "subject": {"organization": "test", "commonName": "an authority"},
                        "uri": "https://fulcio.test",
                        "certChain": {"certificates": [{"rawBytes": _text(_der(self._root))}]},
                        "validFor": {"start": "2020-01-01T00:00:00Z"},
                    }
                ],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [_service("https://fulcio.test")],
                "oidcUrls": [_service("https://oidc.test")],
                "rekorTlogUrls": [_service("https://rekor.test")],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaUrls": [],
                "tsaConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(tree))
        return path

    def sign(self, folder: Path, identity: str, issuer: str) -> bytes:
        """The bundle in which model-signing keeps a keyless signature of that folder, by that identity."""
        from model_signing._signing import signing  # pyright: ignore[reportMissingTypeStubs]

        config: Any = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
        statement: Any = signing.Payload(config.hash(folder)).statement
        from google.protobuf import json_format

        payload = json_format.MessageToJson(statement.pb).encode()
        kind = "application/vnd.in-toto+json"
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._leaf(key.public_key(), identity, issuer)
        signature = key.sign(
            b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload), ec.ECDSA(hashes.SHA256())
        )
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
                "verificationMaterial": {
                    "certificate": {"rawBytes": _text(_der(leaf))},
                    "tlogEntries": [self._entry(payload, signature, leaf)],
                },
                "dsseEnvelope": {
                    "payload": _text(payload),
                    "payloadType": kind,
                    "signatures": [{"sig": _text(signature)}],
                },
            }
        ).encode()

    def _leaf(self, key: ec.EllipticCurvePublicKey, identity: str, issuer: str) -> x509.Certificate:
        san = x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._authority.public_key())
        builder = (
            self._certificate(x509.Name([]), self._root.subject, key, lasts=timedelta(minutes=10))
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(authority, critical=False)
            .add_extension(x509.SubjectAlternativeName([san]), critical=True)
            .add_extension(_unknown(ISSUER_OID, issuer.encode()), critical=False)
        )
        unlogged = builder.sign(self._authority, hashes.SHA256()).tbs_certificate_bytes
        stamp = int(self._now.timestamp() * 1000)
        entry = _digest(_public(self._authority)) + len(unlogged).to_bytes(3) + unlogged
        signed = struct.pack("!BBQH", 0, 0, stamp, 1) + entry + struct.pack("!H", 0)
        proof = self._ct.sign(signed, ec.ECDSA(hashes.SHA256()))
        sct = struct.pack("!B32sQHBBH", 0, _digest(_public(self._ct)), stamp, 0, 4, 3, len(proof)) + proof
        listed = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        octets = b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed
        return builder.add_extension(_unknown(SCT_OID, octets), critical=False).sign(self._authority, hashes.SHA256())

    def _certificate(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePublicKey,
        lasts: timedelta = timedelta(days=1),
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - timedelta(minutes=1))
            .not_valid_after(self._now + lasts)
        )

    def _entry(self, payload: bytes, signature: bytes, leaf: x509.Certificate) -> dict[str, Any]:
        """Of a transparency log that holds nothing else."""
        pem = leaf.public_bytes(serialization.Encoding.PEM)
        sha256 = {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()}
        spec = {
            "payloadHash": sha256,
            "envelopeHash": sha256,  # of a form of the envelope that nobody can check
            "signatures": [{"signature": _text(signature), "verifier": _text(pem)}],
        }
        body = _text(json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}).encode())
        log_id = _digest(_public(self._rekor))
        when = int(self._now.timestamp())
        root = hashlib.sha256(b"\0" + base64.b64decode(body)).digest()
        note = f"{ORIGIN}\n1\n{_text(root)}\n"
        signed = self._rekor.sign(note.encode(), ec.ECDSA(hashes.SHA256()))
        promised = json.dumps(
            {"body": body, "integratedTime": when, "logID": log_id.hex(), "logIndex": 0},
            sort_keys=True,
            separators=(",", ":"),
        )
        promise = self._rekor.sign(promised.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "logIndex": "0",
            "logId": {"keyId": _text(log_id)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(when),
            "inclusionPromise": {"signedEntryTimestamp": _text(promise)},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": _text(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\u2014 {ORIGIN} {_text(log_id[:4] + signed)}\n"},
            },
            "canonicalizedBody": body,
        }

    def _log(self, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
        public = _public(key)
        return {
            "baseUrl": "https://log.test",
            "hashAlgorithm": "SHA2_256",
            "publicKey": {
                "rawBytes": _text(public),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": {"start": "2020-01-01T00:00:00Z"},
            },
            "logId": {"keyId": _text(_digest(public))},
        }


def _service(url: str) -> dict[str, Any]:
    return {"url": url, "majorApiVersion": 1, "validFor": {"start": "2020-01-01T00:00:00Z"}, "operator": "test"}


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _unknown(oid: str, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
