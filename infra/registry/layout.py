"""Where the registry's records lie in a store, by what they are; it does not know what they say."""

from infra.artifacts import check_digest, check_key


def is_digest(text: str) -> bool:
    try:
        return check_digest(text) == text
    except ValueError:
        return False


def manifest_key(digest: str) -> str:
    return f"manifests/{check_digest(digest)}.json"


def ref_key(name: str) -> str:
    if is_digest(name):
        raise ValueError(f"'{name}' is a digest; give the ref a name such as t2v/promoted")
    return f"refs/{check_key(name)}.json"


def log_key(name: str, generation: int) -> str:
    return f"reflog/{check_key(name)}/{generation:08d}.json"
