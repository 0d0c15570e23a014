"""ReleaseFlow: a promoted checkpoint goes live by itself, or goes back by itself (docs/release.md).

    python -m flows.release_flow run --ref ti2v/promoted --key release.key
    python -m flows.release_flow resume

Deployed, it starts whenever CurriculumFlow promotes a `ti2v` checkpoint. Nothing is computed here: each step asks
`infra.engines` or `infra.rollout`, and each may be done again.
"""

# Metaflow has no types: steps, parameters and artifacts are attributes made at run time.
# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import os
from pathlib import Path

from metaflow import FlowSpec, Parameter, card, current, step, trigger

from flows.catalog import target_path
from infra.registry.opening import open_registry


@trigger(event={"name": "stiv.ti2v.promoted", "parameters": {"ref": "digest"}})
class ReleaseFlow(FlowSpec):
    """Export, prove, sign, publish, stand beside stable as a canary, and go live or back."""

    ref = Parameter("ref", default="ti2v/promoted", help="ref or digest of a checkpoint")
    targets = Parameter("targets", default="cpu", help="what to build for, the one that is served here first; by ','")
    key = Parameter("key", default=None, help="private key to sign with; STIV_KEY_PASSWORD if it is encrypted")
    trust = Parameter("trust", default=None, help="policy of trusted keys; STIV_TRUST unless said")
    plan = Parameter("plan", default=None, help="TOML of the canary's plan; docs/release.md has the defaults")
    store = Parameter("store", default="runs/store", help="artifact store: a folder or s3://bucket/prefix")
    work = Parameter("work", default="runs/work", help="folder for exports of this machine")
    home = Parameter("home", default="runs/home", help="folder of the local servers, see `stiv rollout`")
    prometheus = Parameter("prometheus", default=None, help="one that reads the servers; else the home starts one")
    wait = Parameter(
        "wait", default=0.0, help="seconds to wait for another release to end; refused at once unless said"
    )

    @step
    def start(self):
        """Say which checkpoint it is, once: whatever the ref names later, this release is of this one."""
        from flows.releasing import read_plan, require_key

        self.names = [name.strip() for name in str(self.targets).split(",") if name.strip()]
        if not self.names:
            raise ValueError("--targets names nothing to build for; give one such as cpu")
        require_key(self.key)
        read_plan(self.plan)
        self.checkpoint = self._registry().verified(str(self.ref)).digest
        # Kept as artifacts: a resumed run goes on in the folder, and under the name, of the run that it resumes.
        self.holder = f"{current.flow_name}/{current.run_id}"
        self.run_folder = str(Path(str(self.work)).absolute() / f"release-{current.run_id}")
        self.next(self.build, foreach="names")

    @card(type="blank", id="engine")
    @step
    def build(self):
        """Export, build and prove the engine of one target; one figure above its bound ends the release here."""
        from export.engines.targets import load_target
        from flows.releasing import show_engine
        from infra.engines.export import export_engine

        self.target = self.input
        done = export_engine(
            self._registry(),
            self.checkpoint,
            Path(self.run_folder) / self.input,
            who=str(current.username),
            target=load_target(target_path(self.input)),
        )
        self.engine, self.proven = done.manifest.digest, done.parity is not None
        show_engine(current.card["engine"], self._registry(), done)
        self.next(self.sign)

    @step
    def sign(self, inputs):
        """Sign every proven engine; `release/candidate` is the one that is served here."""
        from flows.releasing import sign_engines

        self.merge_artifacts(inputs, include=["checkpoint", "holder", "run_folder", "names"])
        self.engines = {each.target: each.engine for each in inputs}
        self.unproven = [each.target for each in inputs if not each.proven]
        served = self.names[0]
        if served in self.unproven:
            raise ValueError(
                f"the engine for '{served}' is not proven: this machine cannot run it; release where it runs"
            )
        proven = [self.engines[name] for name in reversed(self.names) if name not in self.unproven]
        sign_engines(self._registry(), proven, str(self.key), who=str(current.username))
        self.candidate = self.engines[served]
        self.next(self.canary)

    @card(type="blank", id="release", refresh_interval=5)
    @step
    def canary(self):
        """Stand beside stable, take a share of the requests, and be promoted or go back."""
        from flows.fleet import open_home
        from flows.releasing import ReleaseCard, lead, read_plan
        from infra.rollout.release import Terms

        registry = self._registry()
        environment = {**os.environ, **({"STIV_TRUST": str(Path(str(self.trust)).absolute())} if self.trust else {})}
        plan = read_plan(self.plan)
        home = open_home(
            Path(str(self.home)),
            str(self.store),
            environment,
            prometheus=self.prometheus,
            scrape_every_s=min(5.0, plan.look_every_s),
        )
        board = ReleaseCard(current.card["release"], registry, self.candidate)
        terms = Terms(who=str(current.username), holder=self.holder, plan=plan, wait_s=float(self.wait))
        done = lead(registry, self.candidate, home, terms, board.look)
        board.finish(done)
        self.decision, self.reason = done.outcome.decision, done.outcome.reason
        self.seconds_to_roll_back = done.outcome.seconds_to_roll_back
        self.next(self.end)

    @step
    def end(self):
        """Say what is served now, and why."""
        print(f"{self.decision}: {self.candidate[:16]}, {self.reason}")

    def _registry(self):
        return open_registry(str(self.store), os.environ, trust=Path(str(self.trust)) if self.trust else None)


if __name__ == "__main__":
    ReleaseFlow()
