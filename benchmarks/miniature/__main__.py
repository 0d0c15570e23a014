"""`python -m benchmarks.miniature [--quick]`: run what is missing, judge the claims, write results and page.

It owns the command line. Started again after an interruption it goes on from the runs that are done.
"""

import argparse
import shutil
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.miniature import page
from benchmarks.miniature.outcome import Outcome, collect
from benchmarks.miniature.pictures import samples_picture
from benchmarks.miniature.runs import Workplace
from benchmarks.miniature.schedule import run_all
from benchmarks.miniature.strong import read_strong
from benchmarks.miniature.table import GROUPS, all_rows, quick
from benchmarks.result import number, report

FOLDER = Path(__file__).parent.parent.parent / "runs" / "benchmarks" / "miniature"
QUICK_FOLDER = FOLDER.with_name("miniature_quick")


def main() -> None:
    options = _options()
    console = Console()
    rows = quick(all_rows()) if options.quick else all_rows()
    place = Workplace((QUICK_FOLDER if options.quick else options.root).absolute())
    seeds = range(1 if options.quick else options.seeds)
    if options.quick:
        shutil.rmtree(QUICK_FOLDER, ignore_errors=True)  # it shows that everything runs now
    strong = {} if options.quick else read_strong()  # missing, it is an error now and not after hours
    results = run_all(rows, seeds, place, workers=options.workers, short=options.quick, console=console)
    outcome = collect(rows, results, strong)
    console.print(_table(outcome))
    if not options.quick:
        for name, members in GROUPS.items():
            path = page.IMAGES / f"{page.slug(name)}.png"
            samples_picture([rows[member] for member in members], outcome.seeds[0], place, path)
        outcome.write()
        page.write(outcome)
    report("miniature", figures(outcome), quick=options.quick)


def figures(outcome: Outcome) -> dict[str, float]:
    """What the committed result states."""
    findings = outcome.findings if len(outcome.seeds) > 1 else []
    verdicts = Counter(finding.verdict for finding in findings)
    counts = {f"claims_{word}": float(verdicts[word]) for word in ("confirmed", "undecided", "contradicted")}
    facts = {"rows": float(len(outcome.rows)), "seeds": float(len(outcome.seeds)), "cpu_hours": outcome.cpu_hours}
    return {"claims_total": float(len(findings)), **counts, **outcome.strong, **facts}


def _table(outcome: Outcome) -> Table:
    """Mean ± sd of the Fréchet distance and the joint accuracy of every row; the page has all measures."""
    table = Table("row", title="mean ± sd over seeds", title_justify="left")
    for task in ("t2i", "t2v", "ti2v"):
        table.add_column(f"{task} Fréchet", justify="right")
    for name, row in outcome.rows.items():
        measures = [f"{task}_{page.FRECHET}" for task in ("t2i", "t2v", "ti2v")]
        cells = [(row.mean(measure), row.spread(measure)) for measure in measures]
        table.add_row(name, *("" if mean is None else f"{number(mean)} ± {number(sd or 0.0)}" for mean, sd in cells))
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rows, a few steps, one seed; keeps nothing")
    parser.add_argument("--seeds", type=int, default=3, help="runs a row; claims need at least 2")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--root", type=Path, default=FOLDER, help="folder of the runs; what is done there stands")
    return parser.parse_args()


if __name__ == "__main__":
    main()
