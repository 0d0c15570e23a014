"""ReleaseFlow as a user runs it: a promoted checkpoint is exported, proven, signed, and goes live as a canary."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from flows.fleet import open_home
from infra.registry.registry import Registry
from infra.registry.signing.signatures import sign
from infra.registry.signing.trust import Trust, make_keys
from infra.rollout.release import CANDIDATE, STABLE
from infra.store.location import open_store
from tests.canaries.load import users
from tests.test_engines import publish_checkpoint
from tests.test_flows import content_of
from tests.tiny_export import make_network, make_recipe

PLAN = """\
weights = [50]
look_every_s = 1.5
deadline_s = 400
[limits]
min_samples = 10
[probe]
prompts = ["a red circle moves right"]
num_inference_steps = 2
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_promoted_checkpoint_goes_live_by_itself_and_a_second_one_through_a_canary(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    make_keys(keys / "release", None)
    (keys / "trust.toml").write_text('[[signer]]\nname = "release"\npublic_key = "release.pub"\nrefs = ["release/"]\n')
    (tmp_path / "plan.toml").write_text(PLAN)
    registry = Registry(open_store(str(tmp_path / "store")))
    recipe = make_recipe(
        network={"hidden_size": 32, "depth": 1, "num_heads": 2, "unmasked_depth": 0},
        vae={"latent_channels": 6, "spatial_factor": 4},
    )
    digests = [
        publish_checkpoint(registry, recipe, make_network(recipe, seed, text=384, pooled=384), tmp_path).digest
        for seed in (0, 1)
    ]
    for digest in digests:  # with a policy, whatever is loaded must be signed
        sign(registry.store, registry.manifest(digest), keys / "release.key")
    home = open_home(tmp_path / "home", str(tmp_path / "store"), os.environ)
    environment = {**os.environ, "METAFLOW_USER": "tests", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path)}
    (tmp_path / ".metaflow").mkdir()

    def flow(ref: str) -> str:
        options = {"ref": ref, "key": keys / "release.key", "trust": keys / "trust.toml", "plan": "plan.toml"}
        command = [sys.executable, "-m", "flows.release_flow", "--no-pylint", "run"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        command += ["--store", str(tmp_path / "store"), "--work", str(tmp_path / "work"), "--home", "home"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
        return done.stdout

    try:
        assert "promote: " in flow(digests[0]) and home.canary_engine is None
        first = home.stable_engine
        with users(home.url, 2) as seen:
            shown = flow(digests[1])
            after = home.state
        assert "every check passed at every weight" in shown
        assert seen.made > 10 and not seen.failures
        trusted = Registry(registry.store, trust=Trust.load(keys / "trust.toml"))
        assert trusted.resolve(STABLE).digest == after.stable.engine != first
        assert trusted.ref(CANDIDATE).digest == after.stable.engine and after.canary is None
        assert trusted.resolve(STABLE).parents["checkpoint"] == digests[1]
        assert httpx.get(f"{home.url}/ready").status_code == 200
        cards = (tmp_path / ".metaflow" / "mf.cards").glob("ReleaseFlow/runs/*/steps/canary/tasks/*/cards/*.html")
        shown = content_of(max(cards, key=lambda card: card.stat().st_mtime))
        assert "Decision: promoted" in shown and "data:image/png" in shown and "latency samples" in shown
    finally:
        if home.is_up:
            home.down()
    assert not [
        each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or [])
    ]
