"""One run: a row with a seed, trained and measured in a folder of its own.

It owns what lies in that folder and when a result may stand; of other runs it knows only the checkpoints it grows from.
A result stands while the row's recipe and its parents' are what they were: a changed line of code does not void it,
removing the folder does.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.miniature.rows import CORPUS, Row, codec_recipe


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves in `result.json`."""

    digest: str
    figures: Mapping[str, float]
    train_seconds: float
    """Processor time."""
    measure_seconds: float


@dataclass(frozen=True, slots=True)
class Workplace:
    """The folder of all runs."""

    root: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def codec(self) -> Path:
        return self.root / "codec"

    def run(self, row: str, seed: int) -> Path:
        return self.root / f"{row}.{seed}"

    def samples(self, row: str, seed: int) -> Path:
        """Folder of a few drawn clips, `TASK.npy`."""
        return self.run(row, seed) / "samples"

    def result(self, row: str, seed: int) -> RunResult | None:
        path = self.run(row, seed) / "result.json"
        return RunResult(**json.loads(path.read_text())) if path.exists() else None

    def prepare(self) -> None:
        """Draw the corpus and fit the codec, unless they are there."""
        from model.data.corpus import build_corpus, fit_codec

        done = self.root / "prepared"
        if done.exists():
            return
        shutil.rmtree(self.corpus, ignore_errors=True)
        corpus = build_corpus(self.corpus, CORPUS)
        clip = codec_recipe()
        fit_codec(corpus, clip.vae, clip.video, self.codec)
        done.touch()


def digest_of(rows: Mapping[str, Row], name: str, seed: int) -> str:
    """Names what decides a run's figures: corpus, its recipe as the row states it, and so its parents'."""
    row = rows[name]
    stated = {
        "recipe": row.recipe(seed).model_dump(mode="json", exclude_unset=True),
        "corpus": CORPUS.model_dump(mode="json"),
        "parents": [digest_of(rows, parent, seed) for parent in row.parents],
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def execute(rows: Mapping[str, Row], name: str, seed: int, place: Workplace) -> RunResult:
    """Train the row if it is trained, measure it, write its result. The parents' runs must be there."""
    from benchmarks.miniature.measure import measure
    from model.checkpoint import folder as checkpoint
    from model.data.shards import ShardSet
    from model.training.evaluate import load_network, make_generator
    from model.training.loop import train
    from model.training.run import RunFolders

    row, folder, digest = rows[name], place.run(name, seed), digest_of(rows, name, seed)
    claim_folder(folder, digest)
    recipe = row.recipe(seed)

    def trained(of: str | None) -> Path | None:
        return None if of is None else checkpoint.latest(place.run(of, seed) / "checkpoints")

    began = time.process_time()
    if row.drawn_from is None:
        folders = RunFolders(
            data=place.corpus,
            codec=place.codec,
            run=folder,
            initial=trained(recipe.parent),
            initial_temporal=trained(recipe.temporal_parent),
        )
        train(recipe, folders)
    train_seconds = time.process_time() - began
    weights = trained(row.drawn_from or name)
    assert weights is not None, "a finished run has a checkpoint"
    generator = make_generator(recipe, load_network(recipe, weights), place.codec)
    figures = measure(generator, ShardSet(place.corpus / "heldout"), place.samples(name, seed))
    result = RunResult(digest, figures, train_seconds, time.process_time() - began - train_seconds)
    part = folder / "result.part"
    part.write_text(json.dumps(asdict(result), indent=2))
    part.replace(folder / "result.json")
    return result


def claim_folder(folder: Path, digest: str) -> None:
    """Make the run's folder; what another recipe left in it is removed."""
    mark = folder / "digest"
    if mark.exists() and mark.read_text() == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(digest)
