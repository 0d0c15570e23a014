"""A controller as a process of its own: `python -m tests.chaos.controller RECIPE DATA CODEC RUN`."""

import sys
from pathlib import Path

from infra.launch.local import StageLaunch
from infra.launch.supervise import supervise
from model.recipe import loads_stage
from model.training.run import RunFolders


def main() -> None:
    recipe, data, codec, run = map(Path, sys.argv[1:])
    print(supervise(StageLaunch(loads_stage(recipe.read_bytes()), RunFolders(data, codec, run))))


if __name__ == "__main__":
    main()
