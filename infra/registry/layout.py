"""Where the registry's records lie in a store, by what they are; it does not know what they say."""

from infra.store.artifacts import check_digest, check_key

MANIFESTS = "manifests/"
REFS = "refs/"
LOG = "reflog/"
SIGNATURES = "signatures/"
CLAIMS = "gc/claims/"
MARKS = "gc/marks.json"
SWEEP = "gc/sweep.json"
RELEASE = "release/"
"""Refs that begin so take only signed artifacts."""
EVALUATION = "evaluation/"
"""Among an artifact's files: what was measured of it, and pictures."""
SAMPLE_FIGURES = "evaluation/samples.json"


def is_digest(text: str) -> bool:
    try:
        return check_digest(text) == text
    except ValueError:
        return False


def manifest_key(digest: str) -> str:
    return f"{MANIFESTS}{check_digest(digest)}.json"


def manifest_digest(key: str) -> str:
    return check_digest(key.removeprefix(MANIFESTS).removesuffix(".json"))


def ref_key(name: str) -> str:
    if is_digest(name):
        raise ValueError(f"'{name}' is a digest; give the ref a name such as t2v/promoted")
    return f"{REFS}{check_key(name)}.json"


def ref_name(key: str) -> str:
    return key.removeprefix(REFS).removesuffix(".json")


def log_key(name: str, generation: int) -> str:
    return f"{LOG}{check_key(name)}/{generation:08d}.json"


def signature_key(digest: str, key_id: str) -> str:
    return f"{SIGNATURES}{check_digest(digest)}/{check_digest(key_id)}.json"


def takes_only_signed(ref: str) -> bool:
    """Whether nothing unsigned may be promoted to that ref, or loaded by it."""
    return ref.startswith(RELEASE)
