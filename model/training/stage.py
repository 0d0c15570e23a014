"""A stage in training on one rank: its parts, its step and its checkpoint.

It owns the order of things within a step. It knows nothing of when to save or stop, nor of how its parts were built.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from model.checkpoint import folder as checkpoint
from model.checkpoint.state import Part, Piece, RankState
from model.checkpoint.writer import CheckpointWriter
from model.conditioning import Conditions, replace_frames
from model.data.batch import ClipBatch
from model.data.loader import ClipLoader
from model.flow_matching import loss_weight, masked_loss, path
from model.network.cost import Cost, training_cost
from model.optim.ema import Ema
from model.optim.fragment import Fragment
from model.optim.optimizer import StageOptimizer
from model.recipe import StageRecipe
from model.training.captions import CaptionTable
from model.training.draws import Draws, draw
from model.training.parallel import ParallelEngine
from model.training.run import RunFolders
from model.vae import FrameCodec
from monitoring.goodput import Ledger

logger = logging.getLogger(__name__)


class Diverged(ArithmeticError):
    """A loss or gradient that is not finite; the run's last checkpoint is from before it."""


@dataclass(slots=True, frozen=True)
class StepDone:
    """What a step came to."""

    loss: float
    grad_norm: float
    """Before clipping."""
    stopping: bool
    """Whether any rank was asked to stop."""
    cost: Cost
    """Of all ranks together."""
    rank_seconds: list[float]
    """Each rank's own time in it: its forward passes, in which it waits for no other."""


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
    writer: CheckpointWriter
    inputs: dict[str, str]
    """Digests of what the run was started from."""
    step: int
    """Optimizer steps done."""

    def train_step(self, rate: float, should_stop: Callable[[], bool], ledger: Ledger) -> StepDone:
        """One global batch, its waits for data booked to the ledger."""
        training, own = self.recipe.training, self.engine.stopwatch()
        loss, cost = 0.0, Cost()
        for _ in range(training.gradient_accumulation_steps):
            with ledger.book("data_wait"):
                batch = next(self.loader)
            with own.running():
                part, part_cost = self._loss(batch)
            self.engine.backward(part)
            loss += part.item() / training.gradient_accumulation_steps
            cost += part_cost
        ranks = self.engine.gather(loss, float(should_stop()), own.take())
        losses, asked, rank_seconds = (list(column) for column in zip(*ranks, strict=True))
        loss = sum(losses) / len(ranks)
        with ledger.book("checkpoint_stall"):
            self.writer.settle()
        self.optimizer.learning_rate = rate
        grad_norm = self.engine.step() if math.isfinite(loss) else math.nan
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._diverged(loss, grad_norm, rate)
        self.ema.update(self.step)
        self.step += 1
        return StepDone(loss, grad_norm, any(asked), cost * training.data_parallel, rank_seconds)

    def _loss(self, batch: ClipBatch) -> tuple[Tensor, Cost]:
        recipe = self.recipe if batch.bucket is None else self.recipe.in_shape(batch.bucket)
        batch = batch.to(self.engine.place.device)
        latents = batch.latents(self.codec)
        drawn = self._draw(recipe, batch.numbers, latents)
        text = self.captions.rows(batch.captions, drawn.text_dropped)
        conditions = Conditions.of(text, batch.micro)
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
        cost = training_cost(
            recipe.network,
            recipe.training,
            latents=latents.shape,
            text=conditions.text.shape,
            pooled_size=conditions.pooled.shape[-1],
            masked=self.step < recipe.training.steps,
        )
        return masked_loss(prediction, target, weight), cost

    def _draw(self, recipe: StageRecipe, numbers: Sequence[int], latents: Tensor) -> Draws:
        """What is random about these clips; nothing is masked in the last phase."""
        training = recipe.training
        masked = self.step < training.steps
        return draw(
            recipe,
            numbers,
            latents.shape[1:],
            mask_ratio=training.mask_ratio if masked else 0.0,
            temporal_mask_ratio=training.temporal_mask_ratio if masked else 0.0,
        ).to(latents.device)

    def save(self) -> None:
        """Begin to write a checkpoint; the next step waits for its copy before it moves anything."""
        place, masters = self.engine.place, self.engine.masters
        runs: dict[Part, Sequence[Fragment]] = {
            "model": masters,
            "ema": self.ema.averages,
            "optimizer": self.optimizer.state_of(masters),
        }
        state = RankState(
            step=self.step,
            rank=place.rank,
            world_size=place.world_size,
            tensors={
                part: {run.name: Piece(run.shape, run.start, run.values) for run in own} for part, own in runs.items()
            },
            random=checkpoint.random_state(),
            loader=self.loader.state_dict(),
            inputs=self.inputs,
            recipe=self.recipe,
        )
        self.writer.begin(state)

    def _diverged(self, loss: float, grad_norm: float, rate: float) -> Diverged:
        self.writer.wait()
        good = checkpoint.latest(self.folders.checkpoints)
        return Diverged(
            f"step {self.step}: loss {loss}, gradient norm {grad_norm} at learning rate {rate};"
            f" last good checkpoint: {good or 'none yet'}; lower optimizer.lr or lengthen optimizer.warmup_steps, and"
            " train in a new run folder"
        )
