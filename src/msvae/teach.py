"""The loops of the companion and of the inspector: so many steps, without epochs.

What they do depends on their arguments and the seed alone.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from msvae.alongside import Reached, alone, alongside
from msvae.augment import augment
from msvae.compute import autocast, batch_of, lowers, to_batch
from msvae.config import AugmentConfig, Config, ModelConfig
from msvae.data.cache import Images
from msvae.descent import AdamW, descend
from msvae.errors import TrainingError
from msvae.imagine import Imagination, coloured, varied
from msvae.model import ORDERS, TURNS, VAE, Companion
from msvae.progress import Progress, Seldom, Silent
from msvae.train import DIVERGED, generator_of, learning_rate

T = TypeVar("T")

# What the companion sees is shifted and mirrored, so that it does not know its images by heart.
MOVED = AugmentConfig(flip_horizontal=True, crop=0.125)
COMPANION_STEPS = 12_000  # at most: of a large folder it learns the tasks in fewer passes
# Of a guess's loss, orders and turns together: what is hardly learned in a quarter of the steps, of
# which no fewer than `LOOK`, would weigh little in the fusion, and the others are saved.
HOPELESS = 0.9
LOOK = 240
LATEST = 50  # steps whose mean loss counts
SURE = 0.5  # of a guess's loss of the turns: below it images show which way up they are
ASKED = 512  # images that such questions are asked of, at most
INSPECTOR_RATE = 2e-3
# Larger images show more to tell defects from: steps grow with the side beyond 64 px by this power,
# up to so many times.
FINER, AT_MOST = 2.3, 5


@dataclass(frozen=True)
class Plan:
    """How a network is taught."""

    task: str
    steps: int
    low: bool = False  # whether weights have copies in bfloat16
    weight_decay: float = 1e-4
    hopeless: float = math.inf  # a loss above it after a quarter of the steps ends the training


@dataclass(frozen=True)
class Taught:
    """What became of it: steps done, the mean loss of the last of them, nats, and whether it gave up."""

    steps: int = 0
    loss: float = 0.0
    gave_up: bool = False


def transform(x: Tensor, orders: Tensor, turns: Tensor) -> Tensor:
    """Each image with its channels in the k-th order and turned by its number of quarter turns.

    One gather does both; the result has its channels last in memory.
    """
    b, c, side, _ = x.shape
    grid = torch.arange(side**2, device=x.device).view(side, side)
    places = torch.stack([grid.rot90(k).flatten() for k in TURNS])[turns]
    channels = torch.tensor(ORDERS, device=x.device)[orders]
    at = c * places[:, :, None] + channels[:, None, :]  # (B, S², 3)
    values = x.permute(0, 2, 3, 1).reshape(b, -1).gather(1, at.flatten(1))
    return values.view(b, side, side, c).permute(0, 3, 1, 2)


def pretext_loss(companion: Companion, x: Tensor, orders: Tensor, turns: Tensor) -> Tensor:
    """The companion's cross-entropies of orders and turns (B,) of images (B, 3, s, s), nats."""
    order, turn = companion(transform(x, orders, turns))
    return F.nll_loss(order.float(), orders) + F.nll_loss(turn.float(), turns)


def companion_lesson(model: VAE, pixels: Images, config: Config) -> "Lesson | None":
    """Orders and turns of pixels (N, S, S, 3), taught to the model's companion, in place.

    At its small size a pass over the images is cheap, and it goes on learning long after the VAE has
    stopped (LOG.md).
    """
    companion, c = model.companion, config.train
    if companion is None:
        return None
    device, gen = next(model.parameters()).device, generator_of(c.seed, -1)
    precision = autocast(c, device)
    rows = _endless(len(pixels), c.batch_size, gen)
    passes = c.companion_epochs * len(pixels) // c.batch_size
    steps = min(max(passes, c.min_steps, 1), COMPANION_STEPS)

    def loss() -> Tensor:
        x = augment(companion.reduced(to_batch(pixels[next(rows)], device)), MOVED, gen)
        orders = torch.randint(len(ORDERS), (len(x),), generator=gen).to(device)
        turns = torch.randint(len(TURNS), (len(x),), generator=gen).to(device)
        with precision:
            return pretext_loss(companion, x, orders, turns)

    guess = math.log(len(ORDERS) * len(TURNS))
    hopeless, low = HOPELESS * guess, lowers(c, device)
    plan = Plan("learning orders and turns", steps, low, c.weight_decay, hopeless)
    return Lesson(companion, loss, partial(learning_rate, config=c), plan)


def teach_both(
    model: VAE,
    pixels: Images,
    config: Config,
    train_vae: Callable[[Reached], T],
    progress: Progress | None = None,
) -> tuple[T, Taught]:
    """Teach the model's companion beside the VAE's own training, then the steps that are left.

    `train_vae` trains the VAE and says before each step how many there will be with it. Returns
    what that returns, and what became of the companion.
    """
    lesson = companion_lesson(model, pixels, config)
    with beside_vae(model, lesson) as reached:
        done = train_vae(reached)
    return done, Taught() if lesson is None else lesson.rest(progress)


def beside_vae(model: VAE, lesson: "Lesson | None") -> AbstractContextManager[Reached]:
    """Within it the companion learns while the VAE does, where there are cores for both."""
    if lesson is None:
        return nullcontext(alone)
    return alongside(lesson.step, pace(model.config), next(model.parameters()).device)


def pace(config: ModelConfig) -> float:
    """Steps of the companion that take about as long as one of the VAE, on as many cores.

    A step costs what the maps of its network hold, to a power: measured in both loops at 64 to
    256 px (LOG.md).
    """
    maps = zip(config.hidden_dims, config.sides, strict=True)  # there and back, but for full size
    vae = sum(w * s**2 * (1 if s == config.image_size else 2) for w, s in maps)
    side = min(config.image_size, Companion.SIDE)
    first, *others = [w * (side // 2**i) ** 2 for i, w in enumerate(Companion.WIDTHS)]
    return float((vae / (first + 2 * sum(others))) ** 0.78)


@torch.no_grad()
def upright(model: VAE, pixels: Images) -> bool:
    """Whether images (N, S, S, 3) show which way up they are, as far as the companion can tell.

    Ask it of images that it was not taught on: it may know those by heart.
    """
    companion, device = model.companion, next(model.parameters()).device
    if companion is None:
        return False
    x = torch.cat([companion.reduced(part) for part in _some(pixels, device)])
    told = [companion(x.rot90(k, dims=(2, 3)))[1][:, k] for k in TURNS]
    return float(-torch.stack(told).mean()) < SURE * math.log(len(TURNS))


def _some(pixels: Images, device: torch.device) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) of at most `ASKED` of the pixels, evenly drawn."""
    rows = np.arange(0, len(pixels), -(-len(pixels) // ASKED))
    size = batch_of(pixels[:1].shape[1], device)
    for first in range(0, len(rows), size):
        yield to_batch(pixels[rows[first : first + size]], device)


def inspection_loss(odds: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the pixels, plus the share that mask and marks do not overlap (Dice)."""
    found = odds.sigmoid()
    overlap = (2 * (found * mask).sum() + 1) / (found.sum() + mask.sum() + 1)
    return F.binary_cross_entropy_with_logits(odds, mask) + 0.3 * (1 - overlap)


def inspector_steps(config: Config) -> int:
    """As many as the settings say at 64 px and below, more for larger images."""
    finer = max(config.model.image_size / 64, 1) ** FINER
    return round(config.train.inspector_steps * min(finer, AT_MOST))


def train_inspector(
    model: VAE, pixels: Images, stop: Images, config: Config, progress: Progress | None = None
) -> None:
    """Teach the model's inspector, in place, to mark imagined defects on pixels (N, S, S, 3).

    It wants more steps of smaller batches than the VAE. Where the `stop` images are `upright`, no
    image is laid on its side: a brushed surface would look like another material. Raises
    `TrainingError` when the loss is not a finite number.
    """
    inspector, c, side = model.inspector, config.train, config.model.image_size
    if inspector is None:
        return
    device, gen = next(model.parameters()).device, generator_of(c.seed, -2)
    precision = autocast(c, device)
    imagination = Imagination.prepare(side, coloured(_some(pixels, device)), gen, device)
    rows = _endless(len(pixels), 32 if side <= 64 else 16, gen)
    lying = not upright(model, stop)

    def loss() -> Tensor:
        x = varied(to_batch(pixels[next(rows)], device), gen, lying)
        spoilt, mask = imagination(x, gen)
        spoilt = spoilt.contiguous(memory_format=torch.channels_last)
        with precision:
            odds = inspector(spoilt)
        return inspection_loss(odds.float(), mask)

    def rate(at: float) -> float:
        return INSPECTOR_RATE * min(1, 10 * at + 0.1) * (1 - at)

    plan = Plan("imagining defects", inspector_steps(config), lowers(c, device))
    Lesson(inspector, loss, rate, plan).rest(progress)


class Lesson:
    """What one network is taught: steps on batches that `loss_of` draws, to be taken one by one.

    `rate` is the learning rate by the share of the steps taken.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_of: Callable[[], Tensor],
        rate: Callable[[float], float],
        plan: Plan,
    ) -> None:
        self.network, self.loss_of, self.rate, self.plan = network.train(), loss_of, rate, plan
        self.optimiser = AdamW([network], rate(0), plan.weight_decay, plan.low)
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

    def rest(self, progress: Progress | None = None) -> Taught:
        """Take the steps that are left; `TrainingError` when the loss is not a finite number."""
        progress, left = progress or Silent(), self.plan.steps - self.taken
        worth_saying = Seldom()
        with closing(self.optimiser):
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
        return Taught(self.taken, self._mean(), self.gave_up)

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
