"""The loops of the pretext network and of the defect segmenter: so many steps, without epochs.

What they do depends on their arguments and the seed alone.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from msvae.core.config import AugmentConfig, Config
from msvae.core.device import autocast, batch_size, to_batch
from msvae.core.errors import TrainingError
from msvae.core.progress import NullProgress, Progress, Throttle
from msvae.data.cache import Images
from msvae.networks.model import Networks
from msvae.networks.pretext import ORDERS, TURNS, PretextNet, pretext_loss
from msvae.training.optim import adamw, descend
from msvae.training.vae import DIVERGED, generator_of, learning_rate
from msvae.transforms.augment import augment
from msvae.transforms.defects import DefectGenerator, has_colour, varied

# What the pretext network sees is shifted and mirrored, so that it does not know its images by heart.
MOVED = AugmentConfig(flip_horizontal=True, crop=0.125)
PRETEXT_STEPS = 12_000  # at most: of a large folder it learns the tasks in fewer passes
# Of a guess's loss, orders and turns together: what is hardly learned in a quarter of the steps, of
# which no fewer than `LOOK`, would weigh little in the fusion, and the others are saved.
HOPELESS = 0.9
LOOK = 240
LATEST = 50  # steps whose mean loss counts
SURE = 0.5  # of a guess's loss of the turns: below it images show which way up they are
ASKED = 512  # images that such questions are asked of, at most
SEGMENTER_RATE = 2e-3
# Larger images show more to tell defects from: steps grow with the side beyond 64 px by this power,
# up to so many times.
FINER, AT_MOST = 2.3, 5


@dataclass(frozen=True)
class TrainingPlan:
    """How a network is trained."""

    task: str
    steps: int
    weight_decay: float = 1e-4
    hopeless: float = math.inf  # a loss above it after a quarter of the steps ends the training


@dataclass(frozen=True)
class TrainingResult:
    """What became of it: steps done, the mean loss of the last of them, nats, and whether it gave up."""

    steps: int = 0
    loss: float = 0.0
    gave_up: bool = False


def train_pretext(
    networks: Networks, pixels: Images, config: Config, progress: Progress | None = None
) -> TrainingResult:
    """Train the pretext network, in place, on orders and turns of pixels (N, S, S, 3).

    At its small size a pass over the images is cheap, and it goes on learning long after the VAE has
    stopped (LOG.md). Raises `TrainingError` when the loss is not a finite number.
    """
    trainer = pretext_trainer(networks, pixels, config)
    return TrainingResult() if trainer is None else trainer.run(progress)


def pretext_trainer(
    networks: Networks, pixels: Images, config: Config
) -> "AuxiliaryTrainer | None":
    """What trains the pretext network; None without one."""
    pretext, c = networks.pretext, config.train
    if pretext is None:
        return None
    device, gen = next(pretext.parameters()).device, generator_of(c.seed, -1)
    precision = autocast(c, device)
    rows = _endless(len(pixels), c.batch_size, gen)
    passes = c.pretext_epochs * len(pixels) // c.batch_size
    steps = min(max(passes, c.min_steps, 1), PRETEXT_STEPS)

    def loss() -> Tensor:
        x = augment(pretext.downsample(to_batch(pixels[next(rows)], device)), MOVED, gen)
        orders = torch.randint(len(ORDERS), (len(x),), generator=gen).to(device)
        turns = torch.randint(len(TURNS), (len(x),), generator=gen).to(device)
        with precision:
            return pretext_loss(pretext, x, orders, turns)

    hopeless = HOPELESS * math.log(len(ORDERS) * len(TURNS))
    plan = TrainingPlan("learning orders and turns", steps, c.weight_decay, hopeless)
    return AuxiliaryTrainer(pretext, loss, partial(learning_rate, config=c), plan)


@torch.no_grad()
def shows_orientation(pretext: PretextNet | None, pixels: Images) -> bool:
    """Whether images (N, S, S, 3) show which way up they are, as far as the pretext network can tell.

    Ask it of images that it was not trained on: it may know those by heart.
    """
    if pretext is None:
        return False
    device = next(pretext.parameters()).device
    x = torch.cat([pretext.downsample(part) for part in _some(pixels, device)])
    surprise = [-pretext(x.rot90(k, dims=(2, 3)))[1][:, k] for k in TURNS]
    return float(torch.stack(surprise).mean()) < SURE * math.log(len(TURNS))


def _some(pixels: Images, device: torch.device) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) of at most `ASKED` of the pixels, evenly drawn."""
    rows = np.arange(0, len(pixels), -(-len(pixels) // ASKED))
    size = batch_size(pixels[:1].shape[1], device)
    for first in range(0, len(rows), size):
        yield to_batch(pixels[rows[first : first + size]], device)


def segmentation_loss(odds: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the pixels, plus the share that mask and marks do not overlap (Dice)."""
    marks = odds.sigmoid()
    overlap = (2 * (marks * mask).sum() + 1) / (marks.sum() + mask.sum() + 1)
    return F.binary_cross_entropy_with_logits(odds, mask) + 0.3 * (1 - overlap)


def segmenter_steps(config: Config) -> int:
    """As many as the settings say at 64 px and below, more for larger images."""
    finer = max(config.model.image_size / 64, 1) ** FINER
    return round(config.train.segmenter_steps * min(finer, AT_MOST))


def train_segmenter(
    networks: Networks,
    pixels: Images,
    stop: Images,
    config: Config,
    progress: Progress | None = None,
) -> None:
    """Train the segmenter, in place, to mark imagined defects on pixels (N, S, S, 3).

    It wants more steps of smaller batches than the VAE. Where the `stop` images show which way up
    they are, no image is laid on its side: a brushed surface would look like another material.
    Raises `TrainingError` when the loss is not a finite number.
    """
    segmenter, c, side = networks.segmenter, config.train, config.model.image_size
    if segmenter is None:
        return
    device, gen = next(segmenter.parameters()).device, generator_of(c.seed, -2)
    precision = autocast(c, device)
    defects = DefectGenerator.prepare(side, has_colour(_some(pixels, device)), gen, device)
    rows = _endless(len(pixels), 32 if side <= 64 else 16, gen)
    lying = not shows_orientation(networks.pretext, stop)

    def loss() -> Tensor:
        x = varied(to_batch(pixels[next(rows)], device), gen, lying)
        spoilt, mask = defects(x, gen)
        spoilt = spoilt.contiguous(memory_format=torch.channels_last)
        with precision:
            odds = segmenter(spoilt)
        return segmentation_loss(odds.float(), mask)

    def rate(at: float) -> float:
        return SEGMENTER_RATE * min(1, 10 * at + 0.1) * (1 - at)

    plan = TrainingPlan("imagining defects", segmenter_steps(config))
    AuxiliaryTrainer(segmenter, loss, rate, plan).run(progress)


class AuxiliaryTrainer:
    """Trains one network: steps on batches that `loss_of` draws, to be taken one by one.

    `rate` is the learning rate by the share of the steps taken.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_of: Callable[[], Tensor],
        rate: Callable[[float], float],
        plan: TrainingPlan,
    ) -> None:
        self.network, self.loss_of, self.rate, self.plan = network.train(), loss_of, rate, plan
        self.optimiser = adamw(network, rate(0), plan.weight_decay)
        self.latest = deque[Tensor](maxlen=LATEST)
        self.look = max(plan.steps // 4, LOOK)
        self.taken, self.gave_up = 0, False

    def step(self) -> bool:
        """Take one step, if one is left; whether another is."""
        if self._over():
            return False
        loss = self.loss_of()
        descend(self.optimiser, loss, self.rate(self.taken / self.plan.steps), most=5.0)
        self.latest.append(loss.detach())
        looking = self.taken == self.look < self.plan.steps - 1
        self.gave_up = looking and self._mean() > self.plan.hopeless
        self.taken += 1
        return not self._over()

    def run(self, progress: Progress | None = None) -> TrainingResult:
        """Take the steps that are left; `TrainingError` when the loss is not a finite number."""
        progress, left = progress or NullProgress(), self.plan.steps - self.taken
        worth_saying = Throttle()
        if not self._over():
            for _ in progress.track(range(left), self.plan.task, left):
                more = self.step()
                if worth_saying():
                    progress.note(f"loss {self.latest[-1]:.3f}")
                if not more:
                    break
        if not torch.isfinite(self.latest[-1]):
            raise TrainingError(DIVERGED)
        self.network.eval()
        return TrainingResult(self.taken, self._mean(), self.gave_up)

    def _over(self) -> bool:
        return self.gave_up or self.taken == self.plan.steps

    def _mean(self) -> float:
        return float(torch.stack([*self.latest]).mean())


def _endless(count: int, size: int, gen: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of batches without an end, every image once before any comes again."""
    rest = torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=gen)])
        batch, rest = rest[:size], rest[size:]
        yield batch.numpy()
