"""`stiv`: each command loads a recipe or a ref and calls one function."""

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.catalog import recipe_path
from flows.commands import cluster, data, engine, registry, rollout, serving
from flows.commands.options import StoreOption, TrustOption, WorkOption, open_registry
from flows.commands.tables import console, print_figures, print_gate
from model.recipe import Curriculum, dumps, load

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
vbench = typer.Typer(no_args_is_help=True, help="VBench: draw its videos, add up its scores (docs/evaluate.md).")
app.add_typer(vbench, name="vbench")
app.add_typer(data.app)
app.add_typer(engine.app)
app.add_typer(cluster.app)
app.add_typer(registry.app)
app.add_typer(rollout.rollout, name="rollout")
app.add_typer(serving.app)

SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.section.key=value; stage may be *")]
CheckpointArgument = Annotated[str, typer.Argument(help="ref or digest of a checkpoint")]
DeviceOption = Annotated[str, typer.Option(help="where the network computes: cpu, cuda or cuda:N")]
RecipeArgument = Annotated[str, typer.Argument(help="built-in curriculum or path of a curriculum.toml")]


@app.command()
def recipe(name: RecipeArgument = "tiny", overrides: SetOption = None) -> None:
    """Print a curriculum's resolved tree as JSON."""
    print(dumps(_load(name, overrides)))


@app.command()
def plan(
    name: RecipeArgument = "tiny",
    gpus: Annotated[int | None, typer.Option(help="how many; the recipe's world_size unless said")] = None,
    gpu: Annotated[str, typer.Option(help="b200, h200, h100, h100_pcie, a100, l40s or l4")] = "h200",
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="the whole plan as JSON")] = False,
) -> None:
    """Predict memory, speed and cost of a curriculum on given GPUs, and its best layouts (docs/plan.md)."""
    from flows.commands import plan as shown
    from model.planning.gpu import gpu_named
    from model.planning.plan import plan as run

    planned = run(_load(name, overrides), gpu_named(gpu), gpus)
    if as_json:
        print(shown.as_json(planned))
    else:
        shown.show(planned, console)


@app.command()
def ingest(
    name: RecipeArgument = "tiny",
    videos: Annotated[Path | None, typer.Option(help="folder of video files, each with VIDEO.json beside it")] = None,
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/ingest"),
) -> None:
    """Write and promote the data set and the codec of a curriculum."""
    from infra.ingest import ingest as run

    done = run(open_registry(store), _load(name, None), work, videos=videos, who=getpass.getuser())
    print_figures("data set and codec", done.codec.metrics)


@app.command()
def encode(
    stage: Annotated[str, typer.Argument(help="stage whose height and width are encoded")],
    name: Annotated[str, typer.Option("--recipe", help="built-in curriculum or path of a curriculum.toml")] = "tiny",
    dtype: Annotated[str, typer.Option(help="float16 or float32")] = "float16",
    device: DeviceOption = "cpu",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/encode"),
) -> None:
    """Store the data set's latents at a stage's size, for stages with data.form = 'latents' (docs/data.md)."""
    from rich.progress import Progress

    from infra.latents import dtype_of, encode_dataset

    with Progress(console=console) as progress:
        task = progress.add_task("encoding")
        done = encode_dataset(
            open_registry(store),
            _load(name, None).stage(stage),
            work,
            who=getpass.getuser(),
            dtype=dtype_of(dtype),
            device=device,
            on_clip=lambda clips, total: progress.update(task, completed=clips, total=total),
        )
    print_figures(f"latents {done.digest[:16]}", done.metrics)


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="stage of the curriculum, its parent promoted already")],
    name: Annotated[str, typer.Option("--recipe", help="built-in curriculum or path of a curriculum.toml")] = "tiny",
    overrides: SetOption = None,
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/work/by-hand"),
    checkpoint_store: Annotated[
        str | None, typer.Option(help="folder or s3:// that keeps checkpoints too; an empty --work goes on from it")
    ] = None,
) -> None:
    """Train one stage, evaluate it and promote it through its gate; the curriculum flow does this for all."""
    from flows.commands.watch import StageDisplay
    from infra.launch.stage import run_stage

    wanted = _load(name, overrides).stage(stage)
    with StageDisplay(console) as display:
        outcome = run_stage(
            wanted,
            open_registry(store),
            work,
            who=getpass.getuser(),
            on_progress=lambda lines: display.show(stage, wanted.training.total_steps, lines),
            checkpoint_store=checkpoint_store,
        )
    print_gate(outcome.gate)


@app.command()
def generate(  # noqa: PLR0913 an argument is an option of the command
    prompt: Annotated[str, typer.Argument(help="what the video shows; empty draws without text")] = "",
    task: Annotated[str | None, typer.Option(help="t2v, ti2v, prediction, interpolation, upsampling, …")] = None,
    frames: Annotated[
        list[Path] | None, typer.Option(help="given frames: an image or a video; repeat for more")
    ] = None,
    take: Annotated[str | None, typer.Option(help="which of the given frames: START:STOP or START:STOP:STEP")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="sampling.key=value")] = None,
    out: Annotated[Path, typer.Option(help="video to write (.mp4; .png for a single frame)")] = Path("out.mp4"),
    ref: Annotated[str, typer.Option(help="ref or digest of a checkpoint")] = "ti2v/promoted",
    device: DeviceOption = "cpu",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/generate"),
) -> None:
    """Draw one video with a checkpoint: text to video, image to video and every other task (docs/tasks.md)."""
    from flows.commands.generate import Wish
    from flows.commands.generate import generate as run

    wish = Wish(prompt, task, frames or [], take, seed, overrides or [], out, device)
    film = run(open_registry(store), ref, wish, work, console)
    console.print(f"{out}: {len(film)} frames of {film.shape[2]}x{film.shape[1]}", soft_wrap=True)


@app.command()
def evaluate(
    ref: CheckpointArgument = "ti2v/promoted",
    networks: Annotated[
        list[Path] | None, typer.Option("--network", help="ONNX file with its card: FVD, FID, IS or LPIPS; repeatable")
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="clips drawn a task; the recipe's number unless said")
    ] = None,
    device: DeviceOption = "cpu",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/evaluate"),
) -> None:
    """Measure a checkpoint on its held-out clips; the figures of a stage's gate and more (docs/evaluate.md)."""
    from infra.evaluation import evaluate_checkpoint
    from model.measures.networks import OnnxNetwork

    given = [OnnxNetwork(path) for path in networks or []]
    done = evaluate_checkpoint(open_registry(store), ref, work, networks=given, clips=clips, device=device)
    print_figures(ref, dict(done.metrics))
    console.print(f"{done.grid.parent}: evaluation.json, pictures and animations", soft_wrap=True)


@vbench.command("videos")
def vbench_videos(
    prompts: Annotated[Path, typer.Argument(help="VBench's *_full_info.json, or a text file with a prompt a line")],
    out: Annotated[Path, typer.Argument(help="folder of videos; those it holds already are kept")],
    ref: Annotated[str, typer.Option(help="ref or digest of a checkpoint")] = "ti2v/promoted",
    images: Annotated[Path | None, typer.Option(help="folder of first frames, for VBench-I2V")] = None,
    device: DeviceOption = "cpu",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/evaluate"),
) -> None:
    """Draw the videos of a suite in the layout that the `vbench` package scores."""
    from rich.progress import Progress

    from infra.evaluation import draw_suite
    from infra.trained import fetch_trained

    trained = fetch_trained(open_registry(store), ref, work)
    with Progress(console=console) as progress:
        bar = progress.add_task("videos", total=None)

        def show(drawn: int, wanted: int) -> None:
            progress.update(bar, completed=drawn, total=wanted)

        drawn = draw_suite(trained, prompts, out, images=images, device=device, on_video=show)
    console.print(f"{out}: {drawn} videos drawn", soft_wrap=True)


@vbench.command("scores")
def vbench_scores(
    results: Annotated[list[Path], typer.Argument(help="the package's *_eval_results.json, in any split")],
    i2v: Annotated[bool, typer.Option("--i2v", help="VBench-I2V instead of VBench")] = False,
) -> None:
    """Normalise and weight the scores of every dimension as VBench does."""
    from model.measures.vbench import image_scores, read_results, text_scores

    dimensions = read_results(results)
    if i2v:
        rows = {
            "as the paper does": image_scores(dimensions, "paper"),
            "as vbench does": image_scores(dimensions, "official"),
        }
    else:
        rows = {"as vbench does": text_scores(dimensions)}
    table = Table("weighted", "quality", "I2V" if i2v else "semantic", "total", title="VBench-I2V" if i2v else "VBench")
    for name, scores in rows.items():
        table.add_row(name, *(f"{100 * value:.2f}" for value in (scores.quality, scores.conditioned, scores.total)))
    console.print(table)


@app.command()
def save_pretrained(
    ref: Annotated[str, typer.Argument(help="ref or digest of a checkpoint")],
    folder: Annotated[Path, typer.Argument(help="folder to write, laid out like a diffusers pipeline")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="weights above it are split over files")] = "5GB",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/pretrained"),
) -> None:
    """Save a checkpoint's EMA weights as safetensors and JSON, for use elsewhere."""
    from infra.pretrained import export_pretrained
    from model.pretrained import dtype_of

    wanted = dtype_of(dtype)
    source = export_pretrained(open_registry(store), ref, folder, work, dtype=wanted, max_shard_size=max_shard_size)
    console.print(f"{folder}: checkpoint {source.digest}", soft_wrap=True)


@app.command()
def load_pretrained(
    folder: Annotated[Path, typer.Argument(help="local folder that save-pretrained wrote; nothing is downloaded")],
    evaluate: Annotated[bool, typer.Option("--evaluate", help="measure on the store's held-out clips")] = False,
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/pretrained"),
) -> None:
    """Publish a folder of weights as a checkpoint to grow from and export; `stiv promote` then moves a ref to it."""
    from infra.pretrained import import_pretrained

    done = import_pretrained(open_registry(store), folder, work, measured=evaluate)
    print_figures(f"imported from {done.origin[:16]}", done.manifest.metrics)
    console.print(f"checkpoint {done.manifest.digest}", soft_wrap=True)
    if not done.codec_is_promoted:
        console.print(
            f"its codec {done.codec.digest[:16]} is not this store's codec/promoted: export it, but grow no stage"
            " from it here, which would train on other latents",
            soft_wrap=True,
        )


@app.command()
def serve(
    ref: Annotated[str, typer.Argument(help="ref or digest of an engine")] = "engine/candidate",
    store: StoreOption = "runs/store",
    work: WorkOption = Path("runs/serving"),
    host: Annotated[
        str, typer.Option(help="address to listen on; other than loopback needs STIV_API_KEYS")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    trust: TrustOption = None,
) -> None:
    """Serve an engine with the OpenAI videos API until SIGTERM; SIGHUP fetches the ref anew and swaps the engine."""
    from infra.serving.server import serve as run
    from infra.serving.settings import ServerSettings

    registry = open_registry(store, trust)

    def fetch() -> Path:
        engine = registry.verified(ref)
        return registry.fetch(engine, work / "engines" / engine.digest[:16])

    settings = ServerSettings.from_environment(
        os.environ,
        engine=fetch(),
        database_url=f"sqlite:///{work.absolute()}/jobs.db",
        store_url=str(work / "videos"),
        host=host,
        port=port,
    )
    run(settings, reload=fetch)


@app.command()
def top(
    targets: Annotated[
        list[str], typer.Argument(help="addresses of metrics pages, such as http://127.0.0.1:8000/metrics, or ports")
    ],
    every: Annotated[float, typer.Option(min=0.1, help="seconds from one look to the next")] = 2.0,
) -> None:
    """Watch runs and servers live, until interrupted."""
    from flows.commands.top import watch

    urls = [f"http://127.0.0.1:{each}/metrics" if each.isdigit() else each for each in targets]
    strange = [url for url in urls if not url.startswith(("http://", "https://"))]
    if strange:
        raise ValueError(f"{strange} are no addresses of metrics pages; give http://HOST:PORT/metrics, or a port")
    watch(urls, console, every_s=every)


@app.command()
def api_key(name: Annotated[str, typer.Argument(help="whose key it is; letters, digits, '_' and '-'")]) -> None:
    """Make an API key: shown once on stderr; its entry for the keys file, a digest, on stdout."""
    from infra.serving.clients.keys import new_key

    secret, entry = new_key(name)
    print(f"the key of {name}, which is kept nowhere: {secret}", file=sys.stderr)
    print(entry, end="")


@app.command()
def migrate_jobs(
    database: Annotated[
        str,
        typer.Argument(
            help="SQLAlchemy URL; STIV_DATABASE_URL keeps a password off the list of processes",
            envvar="STIV_DATABASE_URL",
        ),
    ] = "sqlite:///runs/serving/jobs.db",
) -> None:
    """Bring a job database up to this release, after all servers on it have stopped and a copy was made."""
    from infra.serving.jobs.database import VERSION, Database

    Database(database, migrating=True).close()
    console.print(f"the job database holds tables of version {VERSION}")


def main() -> None:
    """Run a command; an error a user can mend is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("STIV_TRACEBACK"):
            raise
        print(f"stiv: {error}", file=sys.stderr)
        sys.exit(1)


def _load(name: str, overrides: list[str] | None) -> Curriculum:
    return load(recipe_path(name), overrides or [])


if __name__ == "__main__":
    main()
