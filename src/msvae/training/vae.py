"""The VAE's loop. What it does depends on its arguments and the seed alone.

Every epoch draws from generators seeded by (seed, epoch), so that a run resumed from the checkpoint
of an epoch gives the same bits as one that was never interrupted (on the CPU).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from msvae.core.config import Config, TrainConfig
from msvae.core.device import autocast, to_batch
from msvae.core.errors import TrainingError
from msvae.core.progress import NullProgress, Progress, Throttle
from msvae.core.state import under
from msvae.data.cache import Images
from msvae.networks.vae import VAE
from msvae.scores.formulas import elbo, gaussian_kl
from msvae.training.optim import adamw, descend
from msvae.transforms.augment import augment

Row = dict[str, float]
Note = Callable[[str], None]
DIVERGED = "the loss is not a finite number: lower train.learning_rate"
SHORTEST_EPOCH = 25  # steps; a small folder is passed over several times in one epoch


@dataclass
class State:
    """All that a resumed run needs: weights and optimiser live in `tensors`, the rest in numbers."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


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


def losses(vae: VAE, x: Tensor, config: TrainConfig, noise: Tensor | None) -> Losses:
    """The mean ELBO of images (B, 3, S, S), the distortion its squared error."""
    recon, mu, logvar, _ = vae(x, noise)
    error, size = F.mse_loss(recon, x), x[0].numel()
    # The optimal decoder variance of the batch; detached, its gradient is that of the analytic
    # σ-VAE loss D/2 log(mean squared error) (Rybkin et al. 2021, eq. 6).
    variance = error.detach() + 1e-6 if vae.sigma_vae else None
    rate = gaussian_kl(mu.float(), logvar.float()).mean()
    return Losses(elbo(error, rate, size, config.beta, variance) / size, error, rate)


class Trainer:
    """The VAE, its optimiser and the plan of one training; `train` drives it epoch by epoch."""

    def __init__(self, vae: VAE, config: Config, count: int) -> None:
        c = self.config = config.train
        self.vae, self.augment, self.count = vae, config.augment, count
        self.latent_dim = config.model.latent_dim
        self.device = next(vae.parameters()).device
        self.optimiser = adamw(vae, c.learning_rate, c.weight_decay)
        self.passes = max(1, round(SHORTEST_EPOCH * c.batch_size / count))
        self.steps = max(1, self.passes * count // c.batch_size)
        self.epochs = max(c.epochs, math.ceil(c.min_steps / self.steps))
        self.precision = autocast(c, self.device)

    def step(self, x: Tensor, rate: float, gen: torch.Generator) -> Losses:
        """One optimiser step on images (B, 3, S, S)."""
        noise = torch.randn(len(x), self.latent_dim, generator=gen)
        loss = self.losses(x, noise.to(self.device))
        descend(self.optimiser, loss.total, rate, most=10.0)
        return loss

    def losses(self, x: Tensor, noise: Tensor | None) -> Losses:
        """The losses of images, in the precision of the training."""
        with self.precision:
            return losses(self.vae, x, self.config, noise)

    def epoch(self, pixels: Images, state: State, ticks: Iterator[int], note: Note) -> Row:
        """All steps of one epoch; the means of its losses as a row of the history."""
        began, seen = time.perf_counter(), torch.zeros(3, device=self.device)
        self.vae.train()
        gen = generator_of(self.config.seed, state.epoch)
        torch.manual_seed(gen.initial_seed())  # dropout draws from the global generator
        worth_saying = Throttle()
        for at, rows in enumerate(_batches(self, gen)):
            next(ticks)
            x = augment(to_batch(pixels[rows], self.device), self.augment, gen)
            done = (state.epoch * self.steps + at) / (self.epochs * self.steps)
            rate = learning_rate(done, self.config)
            loss = self.step(x, rate, gen)
            seen += torch.stack([t.detach() for t in loss])
            if worth_saying():
                note(f"reconstruction {loss.reconstruction:.4f}  kl {loss.kl:.1f} nats")
        if not torch.isfinite(seen).all():
            raise TrainingError(DIVERGED)
        means = dict(zip(Losses._fields, (seen / self.steps).tolist(), strict=True))
        row = {"epoch": state.epoch + 1, **means, "learning_rate": rate}
        return {**row, "seconds": time.perf_counter() - began}

    @torch.inference_mode()
    def stop_loss(self, pixels: Images) -> float:
        """The loss on the stop part: posterior means, no augmentation."""
        self.vae.eval()
        total = 0.0
        for first in range(0, len(pixels), self.config.batch_size):
            x = to_batch(pixels[first : first + self.config.batch_size], self.device)
            total += float(self.losses(x, None).total) * len(x)
        return total / len(pixels)


def train(
    vae: VAE,
    pixels: Images,
    stop: Images,
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
    progress, state = progress or NullProgress(), state or State()
    trainer = Trainer(vae, config, len(pixels))
    if state.tensors:
        _restore(trainer, state)
    left = trainer.epochs * trainer.steps - state.epoch * trainer.steps
    ticks = iter(progress.track(range(left), "training", left))
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
    vae.load_state_dict(under(state.tensors, "best."))
    vae.eval()
    return state


def _patience_over(state: State, patience: int) -> bool:
    return 0 < patience <= state.epoch - state.best_epoch


def generator_of(seed: int, loop: int) -> torch.Generator:
    """The generator of an epoch of the VAE, 0 or more, or of a loop of its own, below 0."""
    return torch.Generator().manual_seed((1_000_003 * seed + loop) % 2**63)


def _batches(trainer: Trainer, gen: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of full batches; a batch smaller than the rest would disturb batch norm."""
    size, count = trainer.config.batch_size, trainer.count
    order = torch.cat([torch.randperm(count, generator=gen) for _ in range(trainer.passes)]).numpy()
    for step in range(trainer.steps):
        yield order[step * size : (step + 1) * size]


def _keep(trainer: Trainer, state: State, loss: float) -> None:
    """Put the present weights and moments into the state, and the best weights so far."""
    weights = {k: v.detach().clone() for k, v in trainer.vae.state_dict().items()}
    best = under(state.tensors, "best.")
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
    groups = trainer.optimiser.state_dict()["param_groups"]
    parameters = trainer.optimiser.param_groups[0]["params"]
    try:
        for name, value in under(state.tensors, "adam.").items():
            index, key = name.split(".", 1)
            adam.setdefault(int(index), {})[key] = _laid_out(value, parameters[int(index)])
        trainer.vae.load_state_dict(under(state.tensors, "now."))
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
