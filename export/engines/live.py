"""An engine that serves while its weights are replaced: proven before it is used, and undone to the bit.

It owns which of two engines answers; it knows nothing of runtimes, checkpoints' files or requests.
"""

import logging
import threading
from collections.abc import Callable, Mapping

from torch import Tensor

from export.engines.protocol import RefittableEngine
from export.parity.report import ParityReport
from model.conditioning import Conditions

logger = logging.getLogger(__name__)

Proof = Callable[[RefittableEngine], ParityReport]
"""Compares an engine with PyTorch; raises ParityFailed if they differ."""


class LiveEngine:
    """Answers by the engine that was proven last.

    A refit makes a second engine beside the first, so memory must hold both until `keep`; in return nothing is ever
    half replaced, a call under way ends with the weights it began with, and `revert` goes back to the very same engine.
    """

    def __init__(self, engine: RefittableEngine, *, weights_sha256: str) -> None:
        """`weights_sha256` names the weights that `engine` holds."""
        self._serving, self._weights = engine, weights_sha256
        self._before: tuple[RefittableEngine, str] | None = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> RefittableEngine:
        return self._serving

    @property
    def weights_sha256(self) -> str:
        """Of what answers the next call."""
        return self._weights

    @property
    def can_revert(self) -> bool:
        return self._before is not None

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return self._serving.denoise(latents, timestep, conditions)

    def refit(self, weights: Mapping[str, Tensor], *, weights_sha256: str, verify: Proof) -> ParityReport:
        """Answer with `weights` from the next call on, once `verify` has passed; until then nothing changes.

        Raises:
            EngineMismatch: weights of another network. ParityFailed: the refitted engine is wrong. Either way the
            engine serves as before.
        """
        with self._lock:
            refitted = self._serving.with_weights(weights)
            report = verify(refitted)
            self._before = self._serving, self._weights
            self._serving, self._weights = refitted, weights_sha256
        logger.info("engine refitted from weights %s to %s", self._before[1][:12], weights_sha256[:12])
        return report

    def verify(self, proof: Proof) -> ParityReport:
        """Prove what serves now."""
        return proof(self._serving)

    def revert(self) -> str:
        """Answer as before the last refit, and say with which weights."""
        with self._lock:
            if self._before is None:
                raise ValueError("nothing to go back to: no refit was made, or it was kept")
            self._serving, self._weights = self._before
            self._before = None
        logger.info("engine reverted to weights %s", self._weights[:12])
        return self._weights

    def keep(self) -> None:
        """Give up what was before the last refit, and its memory."""
        with self._lock:
            self._before = None
