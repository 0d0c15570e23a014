"""Which code is running: the package's version and, in a checkout, its commit; it does not know what for."""

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from infra.registry.records import Code

GIT_SECONDS = 10


@cache
def running_code() -> Code:
    """Read once a process; without git, or out of a checkout of this project, the version is all that is known."""
    commit = _git("rev-parse", "HEAD")
    return Code(
        version=version("stiv-platform"),
        commit=commit,
        modified=None if commit is None else bool(_git("status", "--porcelain")),
    )


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that tracks this very file; None where there is none."""
    here = Path(__file__)
    try:
        for command in (("ls-files", "--error-unmatch", here.name), arguments):
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=GIT_SECONDS, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
