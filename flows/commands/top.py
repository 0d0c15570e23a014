"""A live view of runs and servers in a terminal, straight from their metrics pages: `stiv top`.

It owns which figures are shown; it knows nothing of how a page is read.
"""

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from monitoring.scrape import Page, read_page

Rows = Iterator[tuple[str, str]]


def watch(urls: Sequence[str], console: Console, *, every_s: float, rounds: int | None = None) -> None:
    """Show all until interrupted, or for so many rounds."""
    before: dict[str, tuple[float, Page]] = {}
    with Live(console=console, auto_refresh=False) as live:
        number = 0
        while rounds is None or number < rounds:
            if number:
                time.sleep(every_s)
            live.update(table(urls, before), refresh=True)
            number += 1


def table(urls: Sequence[str], before: dict[str, tuple[float, Page]]) -> Table:
    """A line a figure, a section a process; `before` holds the last pages, for rates, and is brought up to date."""
    shown = Table("process", "figure", "value")
    for url in urls:
        try:
            now, page = time.monotonic(), read_page(url)
        except OSError as error:
            shown.add_row(url, "unreachable", str(error))
            continue
        then, last = before.get(url, (now, page))
        before[url] = now, page
        rows = list(_rows(page, last, now - then)) or [("nothing of this project", "")]
        for place, (figure, value) in enumerate(rows):
            shown.add_row(url if place == 0 else "", figure, value, end_section=place == len(rows) - 1)
    return shown


def _rows(page: Page, last: Page, seconds: float) -> Rows:
    if page.total("stiv_training_steps_total") is not None:
        yield from _training(page, last, seconds)
    if page.total("stiv_queue_depth") is not None:
        yield from _serving(page, last, seconds)
    if page.total("stiv_router_canary_weight_ratio") is not None:
        yield "canary's share", f"{page.total('stiv_router_canary_weight_ratio') or 0:.0%}"
        for track, count in page.by("stiv_router_requests_total", "track").items():
            yield f"requests to {track}", f"{count:g}"


def _training(page: Page, last: Page, seconds: float) -> Rows:
    facts = page.labels("stiv_training_stage_info")
    yield "stage", f"{facts.get('stage', '?')} ({facts.get('task', '?')}), {facts.get('world_size', '?')} ranks"
    yield (
        "steps",
        f"{page.total('stiv_training_steps_total') or 0:g}{_rate(page, last, seconds, 'stiv_training_steps_total')}",
    )
    for name in ("loss", "grad_norm", "goodput_ratio", "mfu_ratio", "straggler_ratio"):
        yield name.replace("_", " "), f"{page.total(f'stiv_training_{name}'):.4g}"
    saved = page.total("stiv_training_last_checkpoint_timestamp_seconds")
    yield "last durable checkpoint", f"{time.time() - saved:.0f} s ago" if saved else "none yet"
    spent = page.by("stiv_training_time_seconds_total", "account")
    total = sum(spent.values())
    for account, part in sorted(spent.items(), key=lambda each: -each[1])[:4]:
        yield f"time in {account}", f"{part / total:.0%}" if total else "0%"


def _serving(page: Page, last: Page, seconds: float) -> Rows:
    facts = page.labels("stiv_engine_info")
    yield "engine", f"{facts.get('digest', '?')} ({facts.get('engine', '?')}, {facts.get('stage', '?')})"
    yield "waiting, running", f"{page.total('stiv_queue_depth'):g}, {page.total('stiv_jobs_running') or 0:g}"
    for outcome, count in page.by("stiv_jobs_total", "outcome").items():
        yield f"videos {outcome}", f"{count:g}{_rate(page, last, seconds, 'stiv_jobs_total', outcome=outcome)}"
    calls, rows = page.total("stiv_denoise_batch_rows_count"), page.total("stiv_denoise_batch_rows_sum")
    if calls and rows:
        yield "rows a denoise step", f"{rows / calls:.2f}"
        yield "denoise step", f"{1000 * (page.total('stiv_denoise_step_seconds_sum') or 0) / calls:.1f} ms"
    states = page.by("stiv_engine_seconds_total", "state")
    if sum(states.values()):
        yield "engine's time", ", ".join(f"{name} {part / sum(states.values()):.0%}" for name, part in states.items())
    yield "memory", f"{(page.total('stiv_memory_bytes') or 0) / 1e9:.2f} GB"


def _rate(page: Page, last: Page, seconds: float, name: str, **labels: str) -> str:
    """Since the last page, in words; nothing on the first."""
    rise = (page.total(name, **labels) or 0.0) - (last.total(name, **labels) or 0.0)
    return f" ({rise / seconds:.2f} a second)" if seconds > 0 else ""
