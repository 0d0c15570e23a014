"""A release moves refs in order, one at a time, and refuses what is not proven, not signed or not seen."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from export.bundle import PARITY
from export.parity.report import BOUNDS, CallParity, ParityFailed, ParityReport
from export.profiles import Shape
from infra.registry.records import Code, Manifest
from infra.registry.registry import Registry
from infra.registry.signing.trust import SignatureRefused, Trust, make_keys
from infra.rollout import lease
from infra.rollout.analysis import Standing
from infra.rollout.canary import CanaryPlan
from infra.rollout.lease import Lease, ReleaseInProgress, releasing
from infra.rollout.probe import Backends
from infra.rollout.prometheus import Prometheus, PrometheusUnreachable
from infra.rollout.release import CANDIDATE, STABLE, Terms, first_release, release, sign_candidate
from infra.store.location import open_store
from model.config import GateRule

SHAPE = Shape(batch=1, frames=1, height=4, width=4, text_tokens=1)


class NoServers:
    """A fleet of nothing, for releases that must end before a server is asked for."""

    canary_engine = None

    def __init__(self, stable: str) -> None:
        self.stable_engine = stable
        self.started: list[str] = []

    def start_canary(self, engine: str) -> None:
        self.started.append(engine)

    def await_canary(self) -> bool:
        return False

    def set_weight(self, percent: int) -> None:
        raise AssertionError(f"a canary that never came up got {percent} %")

    def standing(self) -> Standing:
        return Standing(ready=False, restarts=0)

    def backends(self) -> Backends:
        raise AssertionError("a canary that never came up was probed")

    def promote(self) -> None:
        raise AssertionError("a canary that never came up was promoted")

    def abort(self) -> None:
        self.started.clear()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder / "release", None)
    (folder / "trust.toml").write_text(
        '[[signer]]\nname = "release"\npublic_key = "release.pub"\nrefs = ["release/"]\n'
    )
    return folder


@pytest.fixture
def registry(tmp_path: Path, keys: Path) -> Registry:
    return Registry(open_store(str(tmp_path / "store")), code=Code(version="1"), trust=Trust.load(keys / "trust.toml"))


def engine(registry: Registry, folder: Path, mark: str, *, parity: float | None = 0.5) -> Manifest:
    """A published engine; `parity` is its error over its bound, None of one that was never proven."""
    file = folder / f"{mark}.onnx"
    file.write_text(mark)
    files: Mapping[str, Path] = {"model.onnx": file}
    if parity is not None:
        call = CallParity(
            shape=SHAPE,
            max_abs_error=parity * BOUNDS["fp32"].max_abs_error,
            relative_error=0.0,
            reference_seconds=1.0,
            candidate_seconds=1.0,
        )
        report = ParityReport(subject="0" * 64, precision="fp32", bounds=BOUNDS["fp32"], seed=0, calls=(call,))
        (folder / f"{mark}.json").write_text(report.model_dump_json())
        files = {**files, PARITY: folder / f"{mark}.json"}
    rules = (GateRule(metric="parity_error_over_bound", op="<=", bound=1.0),)
    metrics = {} if parity is None else {"parity_error_over_bound": parity}
    return registry.publish("engine", files, rules=rules, metrics=metrics)


def terms(**changes: object) -> Terms:
    return Terms(**{"who": "tests", "holder": "flow/1", "plan": CanaryPlan(), **changes})  # pyright: ignore[reportArgumentType]


def test_the_first_release_goes_live_signed_and_a_second_first_is_refused(
    registry: Registry, keys: Path, tmp_path: Path
) -> None:
    one, other = engine(registry, tmp_path, "one"), engine(registry, tmp_path, "other")
    with pytest.raises(SignatureRefused, match="'release' has not signed it"):
        first_release(registry, one.digest, who="tests")
    assert not registry.refs(), "nothing unsigned moved a ref"
    for made in (one, other):
        sign_candidate(registry, made.digest, keys / "release.key", None, who="tests")
    assert registry.ref(CANDIDATE).digest == other.digest
    first_release(registry, one.digest, who="tests")
    assert registry.ref(STABLE).digest == one.digest
    with pytest.raises(ValueError, match="there is a release/stable already; release the engine beside it"):
        first_release(registry, other.digest, who="tests")


def test_what_is_not_proven_is_not_signed(registry: Registry, keys: Path, tmp_path: Path) -> None:
    unproven, wrong = engine(registry, tmp_path, "a", parity=None), engine(registry, tmp_path, "b", parity=1.5)
    with pytest.raises(ValueError, match=r"has no parity report: nothing shows .* `stiv engine verify`"):
        sign_candidate(registry, unproven.digest, keys / "release.key", None, who="tests")
    with pytest.raises(ParityFailed, match=r"largest error is 0.00015, fp32 allows 0.0001"):
        sign_candidate(registry, wrong.digest, keys / "release.key", None, who="tests")
    assert not registry.refs()


def test_a_release_without_prometheus_ends_before_anything_is_started(
    registry: Registry, keys: Path, tmp_path: Path
) -> None:
    one, other = engine(registry, tmp_path, "one"), engine(registry, tmp_path, "other")
    for made in (other, one):
        sign_candidate(registry, made.digest, keys / "release.key", None, who="tests")
    fleet = NoServers(one.digest)
    with pytest.raises(ValueError, match=r"there is no release/stable for a canary to stand beside; ReleaseFlow makes"):
        release(registry, other.digest, fleet, Prometheus("http://127.0.0.1:9"), terms())
    first_release(registry, one.digest, who="tests")
    with pytest.raises(PrometheusUnreachable, match=r"127\.0\.0\.1:9 is not ready .* start it, or name another"):
        release(registry, other.digest, fleet, Prometheus("http://127.0.0.1:9"), terms())
    assert not fleet.started and registry.ref(STABLE).digest == one.digest
    assert Lease(registry.store, "next").take(), "a release that ended in an error is no longer in the way"
    with pytest.raises(ValueError, match="'localhost' is no address of a Prometheus"):
        Prometheus("localhost")


def test_of_two_releases_at_once_one_waits_or_is_refused(registry: Registry) -> None:
    order: list[str] = []
    barrier = threading.Barrier(2)

    def run(name: str) -> None:
        barrier.wait()
        with releasing(registry.store, name, wait_s=30):
            order.append(f"{name} begins")
            time.sleep(0.3)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = (order[0].split()[0], order[2].split()[0])
    assert order == [f"{first} begins", f"{first} ends", f"{second} begins", f"{second} ends"]

    with (
        releasing(registry.store, "one"),
        pytest.raises(ReleaseInProgress, match=r"release 'one' is under way since 0 min: let this one wait"),
        releasing(registry.store, "two"),
    ):
        pass


def test_a_resumed_release_has_its_place_still_and_a_dead_one_loses_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Lease(registry.store, "one").take()
    assert Lease(registry.store, "one").take(), "the same release, resumed"
    assert not Lease(registry.store, "two").take()
    monkeypatch.setattr(lease, "TERM_S", -1.0)
    assert Lease(registry.store, "one").take()
    assert Lease(registry.store, "two").take()
    Lease(registry.store, "one").give_back()
    assert Lease(registry.store, "two").refusal().args[0].startswith("release 'two'"), "only the holder gives back"
