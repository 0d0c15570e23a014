"""What a curation leaves beside its shards: the table of scores, statistics, a data set card and a report.

It owns those four files; it knows nothing of how anything was decided.
"""

import base64
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from pydantic import JsonValue

from infra.curate.recipe import CurationRecipe
from infra.curate.results import Results
from infra.curate.scores.scorer import make_embedding, make_scorers
from infra.curate.staging import Row
from infra.curate.work import Work, write_whole
from infra.dataset.statistics import QUANTILES, statistics_of
from infra.dataset.table import Cell, write_table
from model.data.shards import INDEX, SCHEMA_VERSION

_TEMPLATES = Path(__file__).parent / "templates"
_THUMBNAIL = 200


def write_report(work: Work, results: Results, out: Path) -> None:
    """`scores.parquet`, `statistics.json`, `README.md` and `report.html` in `out`; written anew each time."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = work.recipe()
    rows = [_cells(row, results) for row in results.rows]
    if rows:
        write_table(out / "scores.parquet", rows)
    told = _statistics(results, recipe, out) | {"asked": {role: asdict(bill) for role, bill in work.bills().items()}}
    write_whole(out / "statistics.json", json.dumps(told, indent=1, ensure_ascii=False))
    jinja = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape(("html.j2",)))
    facts = {"recipe": recipe, "told": told, "results": results, "totals": results.totals(), "schema": SCHEMA_VERSION}
    write_whole(out / "README.md", jinja.get_template("card.md.j2").render(**facts, licences=_licences(results)))
    wall = {
        each.expression: [(row, passed, _thumbnail(work, row)) for row, passed in each.borderline]
        for each in results.filters(recipe.filters)
    }
    write_whole(
        out / "report.html", jinja.get_template("report.html.j2").render(**facts, wall=wall, models=_models(recipe))
    )


def _cells(row: Row, results: Results) -> dict[str, Cell]:
    answer = results.answers.get(row.key)
    return {
        "key": row.key,
        "item": row.item,
        "file": row.place,
        "file_sha256": row.digest,
        "start_seconds": row.start_seconds,
        "end_seconds": row.end_seconds,
        "num_frames": row.num_frames,
        "outcome": results.reasons[row.key],
        **row.facts,
        "caption": answer.caption if answer else None,
        "captioner": answer.captioner if answer else None,
        "category": answer.category if answer else None,
        "hallucinated_share": answer.audit.share if answer and answer.audit else None,
    }


def _statistics(results: Results, recipe: CurationRecipe, out: Path) -> dict[str, JsonValue]:
    held = asdict(statistics_of(out)) if (out / INDEX).exists() else {}
    return {
        "totals": dict(results.totals()),
        "items": {state: dict(reasons) for state, reasons in results.items.items()},
        "segments": dict(results.segments.most_common()),
        "filters": [
            {"expression": each.expression, "removed": each.removed, "alone": each.alone}
            for each in results.filters(recipe.filters, 0)
        ],
        "dsg_video": {name: asdict(rates) for name, rates in results.rates().items()},
        "categories": dict(Counter(each.category for each in results.answers.values() if each.category)),
        "quantiles_at": list(QUANTILES),
        "set": held,
    }


def _licences(results: Results) -> list[tuple[str, str, int]]:
    """Licence, credit, and how many of the kept segments are under them."""
    kept = results.kept
    found = Counter((row.about.licence or "", row.about.credit or "") for row in results.rows if row.key in kept)
    return [(licence, credit, count) for (licence, credit), count in found.most_common()]


def _models(recipe: CurationRecipe) -> dict[str, str]:
    return {scorer.name: scorer.model for scorer in make_scorers(recipe.scores, make_embedding(recipe.scores))}


def _thumbnail(work: Work, row: Row) -> str:
    """A data URI of the segment's first look; empty where it has none."""
    for unit in work.units():
        looks = sorted((work.item_folder(unit, row.item) / "frames").glob(f"{row.key}-*.jpg"))
        if looks:
            picture = cv2.imdecode(np.frombuffer(looks[len(looks) // 2].read_bytes(), np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            scale = min(1.0, _THUMBNAIL / max(picture.shape[:2]))
            small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            return "data:image/jpeg;base64," + base64.b64encode(cv2.imencode(".jpg", small)[1].tobytes()).decode()
    return ""
