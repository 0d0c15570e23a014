"""CurateFlow: raw videos to a captioned, audited data set as a Metaflow graph, a task a unit of work.

    python -m flows.curate_flow run --recipe film --videos my_videos --out runs/film
    python -m flows.curate_flow resume

Every task calls a step of `infra.curate.curation`, which is what `stiv curate` calls too. A task that is retried, or a
run that is resumed, goes on inside the work folder, which all tasks must see: on one machine any folder, on Kubernetes
a volume that the pods share (`--with kubernetes:persistent_volume_claims=...`).
"""

# Metaflow has no types: steps, parameters and artifacts are attributes made at run time.
# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportUntypedFunctionDecorator=false

import os
from pathlib import Path

from metaflow import FlowSpec, Parameter, card, current, retry, step
from metaflow.cards import Markdown, ProgressBar, Table

from flows.catalog import curation_path


class CurateFlow(FlowSpec):
    """List, then a task a unit: cut, score, filter; find duplicates; a task a unit: caption, audit, write; report."""

    recipe = Parameter("recipe", default="film", help="built-in curation or path of a TOML file")
    videos = Parameter("videos", required=True, help="a folder, s3://bucket/prefix, or a manifest (.jsonl)")
    out = Parameter("out", default="runs/curated", help="folder of the data set")
    work = Parameter("work", default="runs/curate", help="folder that every task sees, for what is under way")

    @step
    def start(self):
        """List the videos and cut the list into units; a recipe that cannot work is refused here."""
        from infra.curate.curation import begin
        from infra.curate.recipe import read_recipe

        begun = begin(read_recipe(curation_path(str(self.recipe))), str(self.videos), Path(str(self.work)).absolute())
        # Kept as an artifact: a resumed run goes on in the folder of the run that it resumes.
        self.folder = str(begun.root)
        self.units = [unit.number for unit in begun.units()]
        self.next(self.stage, foreach="units")

    @card(type="blank", id="unit", refresh_interval=10)
    @retry(times=3)
    @step
    def stage(self):
        """Cut, score, filter and encode the videos of one unit; an item that keeps failing is quarantined."""
        from infra.curate.curation import stage

        work = self._work()
        number = int(str(self.input))
        total = len(work.unit(number).items)
        bar, done = ProgressBar(max=total, label="videos"), [0]
        current.card["unit"].append(Markdown(f"# Unit {self.input}"))
        current.card["unit"].append(bar)

        def show(state):
            done[0] += 1
            bar.update(done[0], metadata=state)
            current.card["unit"].refresh()

        stage(work, number, on_item=show)
        self.next(self.gather)

    @step
    def gather(self, inputs):
        """Wait for every unit; Metaflow wants joins and splits in steps of their own."""
        self.merge_artifacts(inputs)
        self.next(self.deduplicate)

    @step
    def deduplicate(self):
        """Find segments that look alike across all units."""
        from infra.curate.curation import deduplicate

        deduplicate(self._work())
        self.next(self.finish, foreach="units")

    @retry(times=3)
    @step
    def finish(self):
        """Caption and audit what is left of one unit, and write its shards."""
        from infra.curate.curation import finish

        finish(self._work(), int(str(self.input)), os.environ.get("STIV_CAPTION_KEY"))
        self.next(self.report)

    @card(type="blank", id="report")
    @step
    def report(self, inputs):
        """Join the units' shards to one data set, with scores, statistics, card and report."""
        from infra.curate.curation import join

        self.merge_artifacts(inputs)
        results = join(self._work(), Path(str(self.out)))
        self.totals = results.totals()
        board = current.card["report"]
        board.append(Markdown(f"# {self.out}"))
        board.append(_table({(name, ""): count for name, count in self.totals.items()}))
        board.append(_table({("segment", reason): count for reason, count in results.segments.items()}))
        videos = results.items.items()
        board.append(_table({(state, why): count for state, found in videos for why, count in found.items()}))
        self.next(self.end)

    @step
    def end(self):
        """Say what was made."""
        print(f"{self.out}: {self.totals['segments_kept']} clips of {self.totals['items']} videos")

    def _work(self):
        from infra.curate.work import Work

        return Work(Path(self.folder))


def _table(counts):
    return Table(
        [[what, why, str(count)] for (what, why), count in counts.items()], headers=["what", "why", "how many"]
    )


if __name__ == "__main__":
    CurateFlow()
