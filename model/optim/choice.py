"""What a recipe's optimizer section means: which optimizer, and its learning rate at every step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model.config import OptimizerConfig
from model.optim.adafactor import AdaFactor
from model.optim.optimizer import AdamW, StageOptimizer


def make_optimizer(parameters: Iterable[Tensor] | Iterable[dict[str, Any]], config: OptimizerConfig) -> StageOptimizer:
    """What `config.type` names; neither decays weights."""
    if config.type == "adamw":
        return AdamW(parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=0.0)
    return AdaFactor(
        parameters,
        lr=config.lr,
        beta1=config.beta1,
        beta2=config.beta2,
        clip_threshold=config.clip_threshold,
        momentum_dtype=torch.bfloat16 if config.momentum == "bf16" else torch.float32,
    )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of step 0, 1, …: linear warm-up, constant, and a linear fall to zero over the last `decay_steps`."""
    factor = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay_steps:
        factor = min(factor, max(0, total_steps - step) / config.decay_steps)
    return config.lr * factor
