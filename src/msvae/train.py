"""One visible loop. What it does depends on its arguments and the seed alone.

Every epoch draws from generators seeded by (seed, epoch), so that a run resumed from the checkpoint
of an epoch gives the same bits as one that was never interrupted (on the CPU).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from msvae import scores
from msvae.augment import augment
from msvae.compute import compute_type, to_batch
from msvae.config import AugmentConfig, Config, TrainConfig
from msvae.errors import TrainingError
from msvae.imagine import COLOURED, Imagination, varied
from msvae.model import ORDERS, TURNS, VAE, Companion
from msvae.progress import Progress, Silent


class Pixels(Protocol):
    """Pixels (N, S, S, 3): an array, or images that stay on the disk until they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: Any) -> NDArray[np.uint8]: ...


Row = dict[str, float]
Note = Callable[[str], None]
DIVERGED = "the loss is not a finite number: lower train.learning_rate"
# What the companion sees is shifted and mirrored, so that it does not know its images by heart.
MOVED = AugmentConfig(flip_horizontal=True, crop=0.125)
COMPANION_STEPS = 12_000  # at most: of a large folder it learns the tasks in fewer passes
HOPELESS = 0.9  # of a guess's loss: what the companion cannot learn here would weigh nothing
LOOK, LATEST = 240, 50  # steps before it is looked at; the latest of them count
INSPECTOR_RATE = 2e-3
SHORTEST_EPOCH = 25  # steps; a small folder is passed over several times in one epoch


@dataclass
class State:
    """All that a resumed run needs: weights and optimiser live in `tensors`, the rest in numbers."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def transform(x: Tensor, orders: Tensor, turns: Tensor) -> Tensor:
    """Each image with its channels in the k-th order and turned by its number of quarter turns."""
    lookup = torch.tensor(ORDERS, device=x.device)[orders]
    x = x.gather(1, lookup[:, :, None, None].expand_as(x))
    turned = [x.rot90(k, dims=(2, 3)) if k else x for k in TURNS]
    pick = turns[:, None, None, None]
    return sum((torch.where(pick == k, t, 0.0) for k, t in enumerate(turned)), torch.zeros_like(x))


def learning_rate(at: float, config: TrainConfig) -> float:
    """The rate after a share `at` of the steps; `onecycle` warms up over a tenth (Smith 2018)."""
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "onecycle" and at < 0.1:
        return config.learning_rate * (0.05 + 0.95 * at / 0.1)
    start = 0.1 if config.schedule == "onecycle" else 0.0
    wave = 0.5 * (1 + math.cos(math.pi * (at - start) / (1 - start)))
    return config.learning_rate * (0.002 + 0.998 * wave)


class Losses(NamedTuple):
    """The terms of one batch: what is minimised, and what is logged."""

    total: Tensor  # ELBO in nats per pixel value
    reconstruction: Tensor  # squared intensity, mean over pixels
    kl: Tensor  # nats per image


def losses(model: VAE, x: Tensor, beta: float, noise: Tensor | None) -> Losses:
    """The ELBO of images (B, 3, S, S)."""
    e = model(x, noise)
    e = e._replace(recon=e.recon.float(), mu=e.mu.float(), logvar=e.logvar.float())
    error = scores.reconstruction(e).mean()
    # The optimal decoder variance of the batch; detached, its gradient is that of the analytic
    # σ-VAE loss D/2 log(mean squared error) (Rybkin et al. 2021, eq. 6).
    variance = error.detach() + 1e-6 if model.config.sigma_vae else None
    per_value = scores.elbo(e, beta, variance).mean() / x[0].numel()
    return Losses(per_value, error, scores.kl(e).mean())


def pretext_loss(companion: Companion, x: Tensor, orders: Tensor, turns: Tensor) -> Tensor:
    """The companion's cross-entropies of orders and turns (B,) of images (B, 3, s, s), nats."""
    order, turn = companion(transform(x, orders, turns))
    return F.nll_loss(order.float(), orders) + F.nll_loss(turn.float(), turns)


class Trainer:
    """The VAE, its optimiser and the plan of one training; `train` drives it epoch by epoch."""

    def __init__(self, model: VAE, config: Config, count: int) -> None:
        c = self.config = config.train
        self.model, self.augment, self.count = model, config.augment, count
        self.device = next(model.parameters()).device
        self.parameters = list(model.autoencoder())
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=c.learning_rate, weight_decay=c.weight_decay, fused=True
        )
        self.passes = max(1, round(SHORTEST_EPOCH * c.batch_size / count))
        self.steps = max(1, self.passes * count // c.batch_size)
        self.epochs = max(c.epochs, math.ceil(c.min_steps / self.steps))
        self.low_precision = low_precision(c, self.device)

    def step(self, x: Tensor, rate: float, gen: torch.Generator) -> Losses:
        """One optimiser step on images (B, 3, S, S)."""
        noise = torch.randn(len(x), self.model.config.latent_dim, generator=gen)
        loss = self.losses(x, noise.to(self.device))
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.optimiser.step()
        return loss

    def losses(self, x: Tensor, noise: Tensor | None) -> Losses:
        """The losses of images, in the precision of the training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            return losses(self.model, x, self.config.beta, noise)

    def epoch(self, pixels: Pixels, state: State, ticks: Iterator[int], note: Note) -> Row:
        """All steps of one epoch; the means of its losses as a row of the history."""
        began, seen = time.perf_counter(), torch.zeros(3, device=self.device)
        self.model.train()
        gen = _generator(self.config.seed, state.epoch)
        for at, rows in enumerate(_batches(self, gen)):
            next(ticks)
            x = augment(to_batch(pixels[rows], self.device), self.augment, gen)
            done = (state.epoch * self.steps + at) / (self.epochs * self.steps)
            rate = learning_rate(done, self.config)
            loss = self.step(x, rate, gen)
            seen += torch.stack([t.detach() for t in loss])
            if at % 5 == 0:
                note(f"reconstruction {loss.reconstruction:.4f}  kl {loss.kl:.1f} nats")
        if not torch.isfinite(seen).all():
            raise TrainingError(DIVERGED)
        means = dict(zip(Losses._fields, (seen / self.steps).tolist(), strict=True))
        row = {"epoch": state.epoch + 1, **means, "learning_rate": rate}
        return {**row, "seconds": time.perf_counter() - began}

    @torch.inference_mode()
    def stop_loss(self, pixels: Pixels) -> float:
        """The loss on the stop part: posterior means, no augmentation."""
        self.model.eval()
        total = 0.0
        for first in range(0, len(pixels), self.config.batch_size):
            x = to_batch(pixels[first : first + self.config.batch_size], self.device)
            total += float(self.losses(x, None).total) * len(x)
        return total / len(pixels)


def train(
    model: VAE,
    pixels: Pixels,
    stop: Pixels,
    config: Config,
    *,
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    progress: Progress | None = None,
) -> State:
    """Train the VAE in place on pixels (N, S, S, 3); leave the weights that were best on `stop`.

    `state` continues an interrupted training; `save` is called with the state after every epoch.
    Raises `TrainingError` when the loss is not a finite number.
    """
    progress, state = progress or Silent(), state or State()
    trainer = Trainer(model, config, len(pixels))
    if state.tensors:
        _restore(trainer, state)
    total = (trainer.epochs - state.epoch) * trainer.steps
    ticks = iter(progress.track(range(total), "training", total))
    while state.epoch < trainer.epochs and not _patience_over(state, config.train.patience):
        row = trainer.epoch(pixels, state, ticks, progress.note)
        row["stop_loss"] = trainer.stop_loss(stop)
        if not math.isfinite(row["stop_loss"]):
            raise TrainingError(DIVERGED)
        state.epoch += 1
        state.history.append(row)
        _keep(trainer, state, row["stop_loss"])
        save(state)
    next(ticks, None)  # lets the bar end
    model.load_state_dict(_under(state.tensors, "best."))
    model.eval()
    return state


def train_companion(
    model: VAE, pixels: Pixels, config: Config, progress: Progress | None = None
) -> None:
    """Teach the model's companion, in place, orders and turns of pixels (N, S, S, 3).

    A loop of its own: at its small size a pass over the images is cheap, and it goes on learning
    long after the VAE has stopped (LOG.md). It depends on the arguments and the seed alone. Raises
    `TrainingError` when the loss is not a finite number.
    """
    companion, c = model.companion, config.train
    if companion is None:
        return
    device, gen = next(model.parameters()).device, _generator(c.seed, -1)
    rows = _endless(len(pixels), c.batch_size, gen)
    passes = c.companion_epochs * len(pixels) // c.batch_size
    steps = min(max(passes, c.min_steps, 1), COMPANION_STEPS)

    def loss() -> Tensor:
        x = augment(companion.reduced(to_batch(pixels[next(rows)], device)), MOVED, gen)
        orders = torch.randint(len(ORDERS), (len(x),), generator=gen).to(device)
        turns = torch.randint(len(TURNS), (len(x),), generator=gen).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision(c, device)):
            return pretext_loss(companion, x, orders, turns)

    def rate(at: float) -> float:
        return learning_rate(at, c)

    guess = math.log(len(ORDERS) * len(TURNS))
    task = "learning orders and turns"
    _teach(companion, loss, rate, steps, progress, task, hopeless=HOPELESS * guess)


def inspection_loss(odds: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the pixels, plus the share that mask and marks do not overlap (Dice)."""
    found = odds.sigmoid()
    overlap = (2 * (found * mask).sum() + 1) / (found.sum() + mask.sum() + 1)
    return F.binary_cross_entropy_with_logits(odds, mask) + 0.3 * (1 - overlap)


def train_inspector(
    model: VAE, pixels: Pixels, config: Config, progress: Progress | None = None
) -> None:
    """Teach the model's inspector, in place, to mark imagined defects on pixels (N, S, S, 3).

    A loop of its own, since it wants more steps of smaller batches than the VAE; it depends on the
    arguments and the seed alone. Raises `TrainingError` when the loss is not a finite number.
    """
    inspector, c, side = model.inspector, config.train, config.model.image_size
    if inspector is None:
        return
    device, gen = next(model.parameters()).device, _generator(c.seed, -2)
    coloured = float(pixels[:200].std(axis=3).mean()) > COLOURED
    imagination = Imagination.prepare(side, coloured, gen)
    rows = _endless(len(pixels), 32 if side <= 64 else 16, gen)

    def loss() -> Tensor:
        x = varied(to_batch(pixels[next(rows)], device), gen)
        spoilt, mask = imagination(x, gen)
        spoilt = spoilt.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision(c, device)):
            odds = inspector(spoilt)
        return inspection_loss(odds.float(), mask)

    def rate(at: float) -> float:
        return INSPECTOR_RATE * min(1, 10 * at + 0.1) * (1 - at)

    _teach(inspector, loss, rate, c.inspector_steps, progress, "imagining defects")


def _teach(
    network: nn.Module,
    loss_of: Callable[[], Tensor],
    rate: Callable[[float], float],
    steps: int,
    progress: Progress | None,
    task: str,
    hopeless: float = math.inf,
) -> None:
    """So many steps on batches that `loss_of` draws, at a rate by the share of the steps done.

    After a quarter of them it gives up where the loss is still above `hopeless`.
    """
    progress, loss = progress or Silent(), torch.zeros(())
    latest, look = deque[Tensor](maxlen=LATEST), max(steps // 4, LOOK)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-4, fused=True)
    network.train()
    for step in progress.track(range(steps), task, steps):
        loss = loss_of()
        optimiser.param_groups[0]["lr"] = rate(step / steps)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        latest.append(loss.detach())
        if step % 20 == 0:
            progress.note(f"loss {loss:.3f}")
        if step == look and torch.stack([*latest]).mean() > hopeless:
            break
    if not torch.isfinite(loss):
        raise TrainingError(DIVERGED)
    network.eval()


def low_precision(config: TrainConfig, device: torch.device) -> bool:
    """Whether to train in bfloat16."""
    return compute_type(config, device) is torch.bfloat16


def _endless(count: int, size: int, gen: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of batches without an end, every image once before any comes again."""
    rest = torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=gen)])
        batch, rest = rest[:size], rest[size:]
        yield batch.numpy()


def _patience_over(state: State, patience: int) -> bool:
    return 0 < patience <= state.epoch - state.best_epoch


def _generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of one epoch; dropout draws from the global one, so that is seeded too."""
    number = (1_000_003 * seed + epoch) % 2**63
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)


def _batches(trainer: Trainer, gen: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of full batches; a batch smaller than the rest would disturb batch norm."""
    size, count = trainer.config.batch_size, trainer.count
    order = torch.cat([torch.randperm(count, generator=gen) for _ in range(trainer.passes)]).numpy()
    for step in range(trainer.steps):
        yield order[step * size : (step + 1) * size]


def _keep(trainer: Trainer, state: State, loss: float) -> None:
    """Put the present weights and moments into the state, and the best weights so far."""
    weights = {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}
    best = _under(state.tensors, "best.")
    if loss < state.best_loss or not best:
        state.best_loss, state.best_epoch = loss, state.epoch
        best = {k: v.clone() for k, v in weights.items()}
    tensors = {f"now.{k}": v for k, v in weights.items()} | {
        f"best.{k}": v for k, v in best.items()
    }
    for i, moments in trainer.optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v.clone() for k, v in moments.items()}  # they go on changing
    state.tensors = tensors


def _restore(trainer: Trainer, state: State) -> None:
    """Take weights and moments from the state."""
    adam: dict[int, dict[str, Tensor]] = {}
    parameters = trainer.parameters
    groups = trainer.optimiser.state_dict()["param_groups"]
    try:
        for name, value in _under(state.tensors, "adam.").items():
            index, key = name.split(".", 1)
            adam.setdefault(int(index), {})[key] = _laid_out(value, parameters[int(index)])
        trainer.model.load_state_dict(_under(state.tensors, "now."))
        trainer.optimiser.load_state_dict({"state": adam, "param_groups": groups})
    except (RuntimeError, ValueError, IndexError) as error:
        raise TrainingError(
            "the checkpoint belongs to another model: resume with the settings it began with"
        ) from error


def _laid_out(moments: Tensor, parameter: Tensor) -> Tensor:
    """Moments in the memory layout of their parameter: the fused optimiser walks both in step."""
    if moments.dim() == 0:
        return moments.clone()
    return torch.empty_like(parameter, dtype=moments.dtype).copy_(moments)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
