"""The data commands: curate, and what is done with shard sets. The work is `infra.curate`'s and `infra.dataset`'s."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.catalog import curation_path
from flows.commands.options import JsonOption
from flows.commands.tables import console, size_of

app = typer.Typer()
data = typer.Typer(no_args_is_help=True, help="Shard sets: look into, check, split, merge (docs/curate.md).")
app.add_typer(data, name="data")

SetArgument = Annotated[Path, typer.Argument(help="folder of a shard set")]


@app.command()
def curate(
    recipe: Annotated[str, typer.Argument(help="built-in curation or path of a TOML file")] = "film",
    videos: Annotated[str, typer.Option(help="a folder, s3://bucket/prefix, or a manifest (.jsonl)")] = "videos",
    out: Annotated[Path, typer.Option(help="folder of the data set")] = Path("runs/curated"),
    work: Annotated[Path, typer.Option(help="folder for what is under way; a killed run goes on from it")] = Path(
        "runs/curate"
    ),
    processes: Annotated[int | None, typer.Option(min=1, help="one a core unless said")] = None,
) -> None:
    """Turn raw videos into captioned, audited shards; STIV_CAPTION_KEY is sent to the recipe's endpoints."""
    from rich.progress import Progress

    from infra.curate.curation import curate as run
    from infra.curate.recipe import read_recipe

    wanted = read_recipe(curation_path(recipe))
    with Progress(console=console) as progress:
        bars = {step: progress.add_task(step, total=None) for step in ("cut and score", "caption and write")}
        results = run(
            wanted,
            videos,
            work,
            out,
            processes=processes or os.cpu_count() or 1,
            key=os.environ.get("STIV_CAPTION_KEY"),
            on_progress=lambda step, done, total: progress.update(bars[step], completed=done, total=total),
        )
    _print_counts("videos", {(state, reason): n for state, each in results.items.items() for reason, n in each.items()})
    _print_counts("segments", {(reason, ""): count for reason, count in results.segments.most_common()})
    console.print(f"{out}: {results.segments['kept']} clips; {out / 'report.html'}", soft_wrap=True)


@data.command()
def inspect(
    folder: SetArgument,
    key: Annotated[str | None, typer.Option(help="one sample's facts; the set's head unless said")] = None,
    count: Annotated[int, typer.Option(min=1, help="samples shown")] = 10,
) -> None:
    """Show what a set or one of its samples says of itself."""
    from model.data.shards import ShardSet

    shards = ShardSet(folder)
    if key is not None:
        position = next((at for at, entry in enumerate(shards.entries) if entry.key == key), None)
        if position is None:
            raise ValueError(f"{folder} holds no sample '{key}'; `stiv data inspect {folder}` shows its keys")
        facts, clip = shards.stored(position)
        print(json.dumps({**facts, "bytes": len(clip)}, indent=2, ensure_ascii=False))
        return
    table = Table("key", "source", "frames", "stored as", "bytes", "caption")
    for entry in shards.entries[:count]:
        table.add_row(
            entry.key, entry.source, str(entry.num_frames), entry.encoding, str(entry.size), entry.caption[:80]
        )
    console.print(table)
    console.print(f"{len(shards)} samples in {len(shards.index.shards)} shards", soft_wrap=True)


@data.command()
def verify(folder: SetArgument) -> None:
    """Hash every shard, check every sample's bytes, decode every clip; exit code 1 if anything is wrong."""
    from infra.dataset.statistics import verify as run

    problems = run(folder)
    for problem in problems:
        console.print(problem, soft_wrap=True, markup=False)
    console.print(f"{folder}: {len(problems)} problems", soft_wrap=True)
    if problems:
        raise typer.Exit(1)


@data.command()
def split(
    folder: SetArgument,
    out: Annotated[Path, typer.Option(help="a folder a part is made below it")],
    part: Annotated[list[str], typer.Option(help="NAME=SHARE; repeat, shares add up to 1")],
    by: Annotated[str, typer.Option(help="fact whose samples stay together, such as the film they are of")] = "item",
) -> None:
    """Cut a set into parts such as train and heldout, no film in two of them."""
    from infra.dataset.merge import split as run

    shares: dict[str, float] = {}
    for text in part:
        name, equals, share = text.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"--part {text!r} is not NAME=SHARE, such as train=0.9") from None
        if not equals or not name.isidentifier() or not 0 < shares[name] <= 1:
            raise ValueError(f"--part {text!r} is not NAME=SHARE with a share above 0 and up to 1")
    for name, count in run(folder, {name: out / name for name in shares}, shares, by).items():
        console.print(f"{out / name}: {count} samples", soft_wrap=True)


@data.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="shard sets whose keys differ")],
    out: Annotated[Path, typer.Option(help="folder of the new set")],
) -> None:
    """Make one set of several; shards are linked or copied as they are."""
    from infra.dataset.merge import merge as run

    console.print(f"{out}: {len(run(folders, out))} samples", soft_wrap=True)


@data.command()
def stats(folder: SetArgument, as_json: JsonOption = False) -> None:
    """How much a set holds, by source, licence and size, and the spread of its scores."""
    from infra.dataset.statistics import QUANTILES, statistics_of

    found = statistics_of(folder)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    console.print(f"{found.samples} samples, {found.frames} frames, {found.seconds:.1f} s, {size_of(found.size)}")
    for title in ("sources", "licences", "encodings", "sizes"):
        _print_counts(title, {(name, ""): count for name, count in getattr(found, title).items()})
    table = Table("quantile", *(f"{at:.0%}" for at in QUANTILES))
    for name, values in found.quantiles.items():
        table.add_row(name, *(f"{value:.3g}" for value in values))
    console.print(table)


@data.command()
def view(
    folder: SetArgument,
    out: Annotated[Path, typer.Option(help="HTML file to write; open it in a browser")] = Path("gallery.html"),
    count: Annotated[int, typer.Option(min=1, help="samples shown, spread over the set")] = 60,
) -> None:
    """Write a gallery of a set's clips with their captions and facts: one file, nothing is served."""
    from infra.dataset.gallery import write_gallery

    shown = write_gallery(folder, out, count)
    console.print(f"{out}: {shown} clips", soft_wrap=True)


def _print_counts(title: str, counts: dict[tuple[str, str], int]) -> None:
    table = Table("what", "why", "how many", title=title)
    for (what, why), count in counts.items():
        table.add_row(what, why, str(count))
    console.print(table)
