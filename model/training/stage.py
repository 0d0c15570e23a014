"""A stage in training on one rank: its parts, its step and its checkpoint.

It owns the order of things within a step. It knows nothing of when to save or stop, nor of how its parts were built.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from model.checkpoint import folder as checkpoint
from model.conditioning import Conditions, replace_frames
from model.data.loader import ClipBatch, ClipLoader
from model.flow_matching import loss_weight, masked_loss, path
from model.optim.ema import Ema
from model.optim.optimizer import StageOptimizer
from model.recipe import StageRecipe
from model.training.captions import CaptionTable
from model.training.draws import Draws, draw
from model.training.parallel import ParallelEngine
from model.training.run import RunFolders
from model.vae import FrameCodec

logger = logging.getLogger(__name__)


class Diverged(ArithmeticError):
    """A loss or gradient that is not finite; the run's last checkpoint is from before it."""


@dataclass(slots=True)
class StageTraining:
    """A stage in training on one rank."""

    recipe: StageRecipe
    folders: RunFolders
    engine: ParallelEngine
    optimizer: StageOptimizer
    ema: Ema
    loader: ClipLoader
    codec: FrameCodec
    captions: CaptionTable
    inputs: dict[str, str]
    """Digests of what the run was started from."""
    step: int
    """Optimizer steps done."""

    def train_step(self, rate: float, should_stop: Callable[[], bool]) -> tuple[float, float, bool]:
        """One global batch; its loss, its gradient norm before clipping, and whether any rank was asked to stop."""
        loss = 0.0
        for micro_batch in range(self.recipe.training.gradient_accumulation_steps):
            part = self._loss(next(self.loader), micro_batch)
            self.engine.backward(part)
            loss += part.item() / self.recipe.training.gradient_accumulation_steps
        loss, stopping = self.engine.mean(loss, float(should_stop()))
        grad_norm = self.engine.clip_gradients()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._diverged(loss, grad_norm, rate)
        self.optimizer.learning_rate = rate
        self.engine.step()
        self.ema.update(self.step)
        self.step += 1
        return loss, grad_norm, stopping > 0

    def _loss(self, batch: ClipBatch, micro_batch: int) -> Tensor:
        recipe, device = self.recipe, self.engine.place.device
        latents = self.codec.encode(batch.frames.to(device))
        drawn = self._draw(micro_batch, latents)
        text = self.captions.rows(batch.captions, drawn.text_dropped)
        conditions = Conditions.of(text, batch.micro.to(device))
        if recipe.network.image_cross_attention != "off":
            conditions = conditions.with_image(latents[:, 0], drawn.frame_mask[:, 0])
        noisy, target = path(recipe.flow, latents, drawn.noise, drawn.timestep)
        noisy = replace_frames(noisy, latents, drawn.frame_mask & recipe.conditioning.frame_replacement)
        prediction = self.engine(
            noisy,
            drawn.timestep,
            conditions.text,
            conditions.text_mask,
            conditions.pooled,
            conditions.micro,
            keep=drawn.keep,
            keep_frames=drawn.keep_frames,
            image=conditions.image,
            image_given=conditions.image_given,
        )
        left_out = drawn.frame_mask & (not recipe.conditioning.first_frame_loss)
        weight = loss_weight(
            left_out,
            latents,
            keep=drawn.keep,
            patch_size=recipe.network.patch_size,
            keep_frames=drawn.keep_frames,
            temporal_patch_size=recipe.network.temporal_patch_size,
        )
        return masked_loss(prediction, target, weight)

    def _draw(self, micro_batch: int, latents: Tensor) -> Draws:
        """What is random about this rank's clips; nothing is masked in the last phase."""
        training = self.recipe.training
        masked = self.step < training.steps
        return draw(
            self.recipe,
            self._numbers(micro_batch),
            latents.shape[1:],
            mask_ratio=training.mask_ratio if masked else 0.0,
            temporal_mask_ratio=training.temporal_mask_ratio if masked else 0.0,
        ).to(latents.device)

    def _numbers(self, micro_batch: int) -> range:
        """Places of this rank's clips in the global order of the run."""
        training, place = self.recipe.training, self.engine.place
        turn = micro_batch * place.world_size + place.rank
        first = self.step * training.global_batch_size + turn * training.micro_batch_size
        return range(first, first + training.micro_batch_size)

    def save(self) -> Path:
        state = checkpoint.TrainState(
            step=self.step,
            model=self.engine.network.state_dict(),
            ema=self.ema.weights,
            optimizer=self.optimizer.state_by_name(names_of(self.engine.network)),
            random=checkpoint.random_state(),
            loader=self.loader.state_dict(),
            inputs=self.inputs,
            recipe=self.recipe,
        )
        folder = checkpoint.save(self.folders.checkpoints, state, keep=self.recipe.training.keep_checkpoints)
        logger.info("saved %s", folder)
        return folder

    def _diverged(self, loss: float, grad_norm: float, rate: float) -> Diverged:
        good = checkpoint.latest(self.folders.checkpoints)
        return Diverged(
            f"step {self.step}: loss {loss}, gradient norm {grad_norm} at learning rate {rate};"
            f" last good checkpoint: {good or 'none yet'}; lower optimizer.lr or lengthen optimizer.warmup_steps, and"
            " train in a new run folder"
        )


def names_of(network: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in network.named_parameters()}
