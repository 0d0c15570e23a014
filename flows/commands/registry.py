"""The registry's commands: promote, look back and compare, sign, clean up. What they do is `infra.registry`'s."""

import getpass
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from flows.commands.options import JsonOption, StoreOption, TrustOption, open_registry
from flows.commands.tables import console, print_changes, print_gate, size_of
from infra.registry.records import Ref

app = typer.Typer()
events = typer.Typer(
    no_args_is_help=True, help="Events of moved refs, told to a webhook or to Argo Events (docs/promote.md)."
)
app.add_typer(events, name="events")

RefArgument = Annotated[str, typer.Argument(help="ref, such as t2v/promoted")]
ArtifactArgument = Annotated[str, typer.Argument(help="ref or digest of a published artifact")]
WhyOption = Annotated[str, typer.Option(help="reason, kept in the log")]


@app.command()
def promote(
    artifact: ArtifactArgument,
    ref: Annotated[str, typer.Argument(help="ref to move, such as t2v/promoted")],
    why: WhyOption,
    override: Annotated[str | None, typer.Option(help="reason to pass over a failed gate; visible for ever")] = None,
    store: StoreOption = "runs/store",
    trust: TrustOption = None,
) -> None:
    """Point a ref at an artifact, through the gate it was published with."""
    registry = open_registry(store, trust)
    manifest = registry.look_up(artifact)
    moved = registry.promote(ref, manifest.digest, who=getpass.getuser(), why=why, override=override)
    print_gate(moved.gate)
    _print_move(moved)


@app.command()
def rollback(
    ref: RefArgument,
    why: WhyOption,
    to: Annotated[int | None, typer.Option(help="generation to go back to; the one before unless said")] = None,
    store: StoreOption = "runs/store",
    trust: TrustOption = None,
) -> None:
    """Point a ref at what it pointed at before."""
    _print_move(open_registry(store, trust).rollback(ref, who=getpass.getuser(), why=why, to=to))


@app.command()
def history(ref: RefArgument, store: StoreOption = "runs/store", as_json: JsonOption = False) -> None:
    """Every move of a ref, newest first, with its gate's verdict and every override."""
    moves = open_registry(store).history(ref)
    if as_json:
        print(json.dumps([move.model_dump(mode="json") for move in moves], indent=2))
        return
    table = Table("generation", "digest", "when", "who", "why", "gate", "override")
    for move in moves:
        table.add_row(
            str(move.generation),
            move.digest[:16],
            f"{move.when:%Y-%m-%d %H:%M}",
            move.who,
            move.why if move.restores is None else f"{move.why} (back to {move.restores})",
            "passed" if move.gate.passed else "failed",
            move.override or "",
        )
    console.print(table)


@app.command()
def diff(
    before: ArtifactArgument, after: ArtifactArgument, store: StoreOption = "runs/store", as_json: JsonOption = False
) -> None:
    """What two artifacts differ in: recipe, figures, data, files, code."""
    from infra.registry.difference import difference

    registry = open_registry(store)
    found = difference(registry.look_up(before), registry.look_up(after))
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_changes(found)


@app.command()
def lineage(
    artifact: ArtifactArgument,
    form: Annotated[Literal["text", "dot", "html"], typer.Option(help="how to show it")] = "text",
    out: Annotated[Path | None, typer.Option(help="file to write; printed unless said")] = None,
    store: StoreOption = "runs/store",
) -> None:
    """What an artifact was made from, back to the first stage, its data set and codec."""
    from flows.commands import lineage as shown
    from infra.registry.lineage import lineage as run

    draw = {"text": shown.as_text, "dot": shown.as_dot, "html": shown.as_html}[form]
    text = draw(run(open_registry(store), artifact))
    if out is None:
        print(text)
    else:
        out.write_text(text)
        console.print(str(out), soft_wrap=True)


@app.command()
def gc(
    phase: Annotated[
        Literal["survey", "mark", "sweep"], typer.Argument(help="survey: only say; mark: write down; sweep: delete")
    ] = "survey",
    keep_days: Annotated[int, typer.Option(min=1, help="what is younger, or was in use since, is kept")] = 30,
    grace_days: Annotated[int, typer.Option(min=1, help="days between a mark and its deletion")] = 7,
    store: StoreOption = "runs/store",
) -> None:
    """Find what nothing needs any more; mark it; a grace later delete what is still not needed."""
    from infra.registry.upkeep import collect

    registry, keep, grace = open_registry(store), timedelta(days=keep_days), timedelta(days=grace_days)
    if phase == "sweep":
        done = collect.sweep(registry, who=getpass.getuser(), keep=keep, grace=grace).due
        console.print(f"deleted {len(done)} objects, {size_of(sum(done.values()))}")
        return
    found = (collect.mark if phase == "mark" else collect.survey)(registry, keep=keep, grace=grace)
    table = Table("objects", "size", "what")
    due = f"marked {grace_days} days ago or longer"
    for what, keys in (("nothing needs them", found.unreachable), (due, found.due)):
        table.add_row(str(len(keys)), size_of(sum(keys.values())), what)
    console.print(table)
    following = {"survey": "`stiv gc mark` writes them down", "mark": f"in {grace_days} days: `stiv gc sweep`"}
    console.print(f"nothing was deleted; {following[phase]}")


@app.command()
def verify(
    refs: Annotated[list[str] | None, typer.Argument(help="refs or digests; everything published unless said")] = None,
    workers: Annotated[int, typer.Option(min=1, help="files hashed at a time")] = 8,
    store: StoreOption = "runs/store",
    trust: TrustOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hash every file anew and follow every ref; exit code 1 if anything is missing, corrupt or unsigned."""
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    from infra.registry.upkeep.audit import audit

    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), disable=as_json) as bar:
        task = bar.add_task("hashing", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        found = audit(open_registry(store, trust), refs or (), workers=workers, on_progress=show)
    if as_json:
        print(json.dumps(found.as_tree(), indent=2))
    else:
        for problem in found.problems:
            concerns = f" ({', '.join(problem.of)})" if problem.of else ""
            console.print(f"{problem.key}: {problem.what}{concerns}", soft_wrap=True, markup=False)
        console.print(
            f"{found.manifests} artifacts, {found.files} files, {size_of(found.size)}, {found.signatures} signatures:"
            f" {len(found.problems)} problems"
        )
    if found.problems:
        raise typer.Exit(1)


@app.command()
def keygen(
    name: Annotated[Path, typer.Argument(help="writes NAME.key and NAME.pub; STIV_KEY_PASSWORD encrypts the former")],
) -> None:
    """Make a pair of keys to sign with (EC P-256)."""
    from infra.registry.signing.trust import make_keys

    private, public = make_keys(name, _password())
    console.print(f"{private}: keep it secret, and out of the repository", soft_wrap=True)
    console.print("to trust it, in a policy file:", soft_wrap=True)
    print(f'\n[[signer]]\nname = "{name.name}"\npublic_key = "{public.name}"\nrefs = ["release/"]')


@app.command()
def sign(
    artifact: ArtifactArgument,
    key: Annotated[Path | None, typer.Option(help="private key in PEM; STIV_KEY_PASSWORD if it is encrypted")] = None,
    keyless: Annotated[bool, typer.Option(help="by Sigstore, as who the CI's job or the browser says one is")] = False,
    store: StoreOption = "runs/store",
) -> None:
    """Sign a published artifact: its manifest, and thereby every file and parent that names."""
    from infra.registry.signing import signatures

    if keyless == (key is not None):
        raise ValueError("say how to sign: --key FILE, or --keyless")
    registry = open_registry(store)
    manifest = registry.look_up(artifact)
    if key is not None:
        console.print(signatures.sign(registry.store, manifest, key, _password()), soft_wrap=True)
        return
    place, signer = signatures.sign_keyless(registry.store, manifest)
    console.print(place, soft_wrap=True)
    console.print("to trust it, in a policy file:", soft_wrap=True)
    print(f'\n[[signer]]\nname = "ci"\nidentity = "{signer.identity}"\nissuer = "{signer.issuer}"\nrefs = ["release/"]')


@events.command("deliver")
def events_deliver(store: StoreOption = "runs/store") -> None:
    """Send every event that has not been taken yet; exit code 1 if some are left."""
    from infra.registry.opening import outboxes

    boxes = outboxes(open_registry(store), os.environ)
    if not boxes:
        raise ValueError(
            "nobody is to be told: set STIV_WEBHOOK_URL and STIV_WEBHOOK_SECRET, or METAFLOW_ARGO_EVENTS_WEBHOOK_URL"
        )
    done = [box.deliver() for box in boxes]
    for move in (move for each in done for move in each.told):
        _print_move(move)
    if reasons := [each.reason for each in done if each.left]:
        left = sum(len(each.left) for each in done)
        raise ValueError(f"{left} events are left for the next time: {'; '.join(reasons)}")


def _print_move(move: Ref) -> None:
    back = "" if move.restores is None else f", back to {move.restores}"
    console.print(f"{move.name} -> {move.digest} (generation {move.generation}{back})", soft_wrap=True)


def _password() -> bytes | None:
    return os.environ["STIV_KEY_PASSWORD"].encode() if os.environ.get("STIV_KEY_PASSWORD") else None
