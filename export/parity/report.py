"""What a parity check found, what is allowed, and the figures a gate reads.

It owns errors, bounds and the verdict; it knows nothing of engines or of how anything was measured.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

from pydantic import ConfigDict

from export.profiles import Shape
from model.config import Config


class ParityBounds(Config):
    """How far an engine may be from PyTorch in float32. Velocities and latents are of order 1."""

    max_abs_error: float
    """Largest difference of a velocity's values, in one call."""
    relative_error: float
    """Root mean square of that difference over the velocity's own."""
    trajectory_error: float
    """The same of the latents, after the last step of a trajectory."""
    psnr_db: float
    """Least agreement of the decoded frames."""


BOUNDS: dict[str, ParityBounds] = {
    "fp32": ParityBounds(max_abs_error=1e-4, relative_error=2e-5, trajectory_error=1e-4, psnr_db=60.0),
    "fp16": ParityBounds(max_abs_error=2e-2, relative_error=2e-3, trajectory_error=4e-3, psnr_db=40.0),
    "bf16": ParityBounds(max_abs_error=3e-1, relative_error=3e-2, trajectory_error=4.5e-2, psnr_db=32.0),
    "int8": ParityBounds(max_abs_error=5e-1, relative_error=5e-2, trajectory_error=1e-1, psnr_db=28.0),
    "fp8": ParityBounds(max_abs_error=5e-1, relative_error=6e-2, trajectory_error=1e-1, psnr_db=28.0),
}
"""By the engine's lowest precision; docs/export.md says where each comes from."""


class Check(NamedTuple):
    """One figure against its bound."""

    what: str
    found: float
    bound: float
    over: float
    """Above 1 it is refused; infinite for what is not a number."""


class CallParity(Config):
    """One call of both engines on the same inputs."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    shape: Shape
    max_abs_error: float
    """NaN if either velocity is not finite."""
    relative_error: float
    reference_seconds: float
    candidate_seconds: float


class TrajectoryParity(Config):
    """Both engines from the same noise to a video, each on its own latents."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    shape: Shape
    errors: tuple[float, ...]
    """Relative error of the latents after each step."""
    psnr_db: float | None
    """Of the decoded frames; None where no codec was given."""


class RowParity(Config):
    """Rows of unlike times, texts and given frames in one call against each alone, both by the engine."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    rows: int
    max_abs_error: float


class ParityFailed(Exception):
    """An engine that does not compute what its reference does; it must not be published."""

    def __init__(self, message: str, report: Config) -> None:
        super().__init__(message)
        self.report = report


class ParityReport(Config):
    subject: str
    """sha256 of the proven file."""
    precision: str
    bounds: ParityBounds
    seed: int
    calls: tuple[CallParity, ...]
    trajectories: tuple[TrajectoryParity, ...] = ()
    rows: tuple[RowParity, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.calls) and all(check.over <= 1 for check in self.checks())

    @property
    def worst_call(self) -> CallParity:
        return max(self.calls, key=lambda call: _rank(call.max_abs_error))

    @property
    def metrics(self) -> dict[str, float]:
        """What the engine's manifest carries. The gate reads the first, which holds all others to their bounds."""
        figures = {
            "parity_error_over_bound": max(check.over for check in self.checks()),
            "parity_max_abs_error": max((call.max_abs_error for call in self.calls), key=_rank),
            "parity_relative_error": max((call.relative_error for call in self.calls), key=_rank),
        }
        if self.trajectories:
            figures["parity_trajectory_error"] = max((one.errors[-1] for one in self.trajectories), key=_rank)
        decoded = [one.psnr_db for one in self.trajectories if one.psnr_db is not None]
        if decoded:
            figures["parity_psnr_db"] = min(decoded, key=lambda found: -math.inf if math.isnan(found) else found)
        if self.rows:
            figures["parity_batch_error"] = max((one.max_abs_error for one in self.rows), key=_rank)
        return figures

    def checks(self) -> Iterator[Check]:
        limit = self.bounds
        for call in self.calls:
            yield _below(f"{call.shape}: largest error", call.max_abs_error, limit.max_abs_error)
            yield _below(f"{call.shape}: relative error", call.relative_error, limit.relative_error)
        for one in self.trajectories:
            yield _below(f"{one.shape}: error after {len(one.errors)} steps", one.errors[-1], limit.trajectory_error)
            if one.psnr_db is not None:
                over = math.inf if math.isnan(one.psnr_db) else limit.psnr_db / max(one.psnr_db, 1e-9)
                yield Check(f"{one.shape}: PSNR of the video in dB", one.psnr_db, limit.psnr_db, over)
        for rows in self.rows:
            yield _below(f"{rows.rows} rows against each alone: error", rows.max_abs_error, limit.max_abs_error)

    def require_passed(self) -> Self:
        if not self.calls:
            raise ParityFailed("no shape was compared, so nothing is shown", self)
        checks = list(self.checks())
        failed = [check for check in checks if not check.over <= 1]
        if failed:
            worst = max(failed, key=lambda check: _rank(check.over))
            raise ParityFailed(
                f"{worst.what} is {worst.found:.3g}, {self.precision} allows {worst.bound:g}"
                f" ({len(failed)} of {len(checks)} checks fail)",
                self,
            )
        return self


def _below(what: str, found: float, bound: float) -> Check:
    return Check(what, found, bound, math.inf if math.isnan(found) else found / bound)


def _rank(error: float) -> float:
    """Orders errors with what is not a number as the worst."""
    return math.inf if math.isnan(error) else error
