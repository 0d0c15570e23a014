"""The cut stage as two programs over the same files: PySceneDetect's own command line, and ours.

It owns how each is started and what counts as its work; it measures nothing. Both find the same kind of cuts at the
same threshold; ours hands out upright frames at the stored size besides, which the peer does not.
"""

import os
import subprocess
import sys
from pathlib import Path

from infra.curate.cut import segments
from infra.curate.footage import Footage, moments
from infra.curate.recipe import CutConfig, LimitsConfig

ROOT = Path(__file__).parents[2]
CUT = CutConfig(fade_threshold=0, max_fps=60, crop_borders=False, max_seconds=10)
OURS, PEER = "ours", "pyscenedetect_cli"


def command(name: str, video: Path, folder: Path) -> list[str]:
    """What is run; it ends when the whole video was looked at and its scenes are written below `folder`."""
    if name == OURS:
        return [sys.executable, "-m", "benchmarks.contestants.scene_cli", str(video), str(folder / "ours.csv")]
    cli = str(Path(sys.executable).with_name("scenedetect"))
    scenes = ["detect-content", "--threshold", "27", "--min-scene-len", "15", "list-scenes", "--quiet"]
    return [cli, "--quiet", "--output", str(folder), "--input", str(video), *scenes]


def run(name: str, video: Path, folder: Path) -> None:
    subprocess.run(command(name, video, folder), cwd=ROOT, check=True, capture_output=True)


def write_scenes(video: Path, out: Path) -> None:
    footage = Footage.of(video, LimitsConfig())
    found = segments(moments(footage, CUT, LimitsConfig(), os.cpu_count()), footage.fps(CUT), CUT)
    out.write_text("".join(f"{segment.start},{len(segment.frames)}\n" for segment in found))


if __name__ == "__main__":
    write_scenes(Path(sys.argv[1]), Path(sys.argv[2]))
