"""AdaFactor's numbers of one step, and what whole and cut parameters share of the rule."""

from dataclasses import dataclass

from torch import Tensor

EPSILON = 1e-30
"""Added to squared gradients, so that a gradient of zero divides."""


@dataclass(slots=True, frozen=True)
class Rule:
    """A step's settings."""

    lr: float
    beta1: float
    beta2: float
    """With its bias correction, see `corrected_beta2`."""
    clip_threshold: float

    def accumulate(self, momentum: Tensor, update: Tensor, scale: Tensor) -> Tensor:
        """Take `update` times `scale` into the momentum; the move that follows, in the update's precision."""
        if momentum.dtype == update.dtype:
            return momentum.mul_(self.beta1).addcmul_(update, scale)
        move = momentum.to(update.dtype).mul_(self.beta1).addcmul_(update, scale)
        momentum.copy_(move)
        return move


def corrected_beta2(beta2: float, step: int) -> float:
    """Constant beta2 with its bias correction folded in: 0 at step 1, towards `beta2` later."""
    return beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
