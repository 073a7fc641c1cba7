"""Training: the real loop against a bare step, against the textbook's loop, against pythae."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bench.material import SIDES, Material
from bench.peers import HERE, Peer
from bench.rows import Once, Row, compared, interleaved, rates, timed
from msvae import heap
from msvae.alongside import Reached
from msvae.compute import choose_device, lowers, to_batch
from msvae.config import Config
from msvae.descent import AdamW
from msvae.fitting import Keeper
from msvae.model import ORDERS, TURNS, VAE
from msvae.teach import pretext_loss, teach_both
from msvae.train import Trainer, losses, train

EPOCHS = 2  # of a round of the fast contestants
STEPS = {64: 100, 128: 40}  # of each epoch, by the size of the images
SLOW_STEPS = {64: 25, 128: 10}  # of a round of the slow ones, one epoch
ROUNDS = 5
STOP_SHARE = 0.05


def settings(side: int, epochs: int = 1) -> Config:
    """The default preset, for a few short epochs of the VAE and of the companion."""
    return Config().replace(image_size=side, epochs=epochs, companion_epochs=epochs, min_steps=0)


def fresh(config: Config, memory: torch.memory_format) -> VAE:
    """A model with random weights, in training mode."""
    torch.manual_seed(0)
    model = VAE(config.model).to(choose_device())
    return model.to(memory_format=memory).train()  # type: ignore[call-overload]


def loop(material: Material, config: Config, steps: int) -> Once:
    """Seconds of the loops, side by side on a CPU, on the decoded cache, with stop loss and
    checkpoints.
    """
    side, count = config.model.image_size, steps * config.train.batch_size
    held = round(STOP_SHARE * count)
    decoded = material.decoded(count + held, side)
    parts = decoded.some(range(count)), decoded.some(range(count, count + held))
    model = fresh(config, torch.channels_last)

    def train_vae(reached: Reached) -> None:
        train(model, *parts, config, save=Keeper(material.work / "kept", {}), reached=reached)

    def both() -> None:
        with heap.kept():
            teach_both(model, parts[0], config, train_vae)

    return timed(both)


def bare(config: Config, steps: int) -> Once:
    """Seconds of forward, backward and optimiser on one tensor that never changes.

    Of the VAE, then of the companion. No decoding, no augmentation, no clipping, no logging: what
    the arithmetic alone takes.
    """
    each = bare_steps(config)

    def both() -> None:
        for one in each:
            for _ in range(steps):
                one()

    return timed(both)


def bare_steps(config: Config) -> list[Callable[[], None]]:
    """A step of the VAE; one of the companion, where there is one."""
    model = fresh(config, torch.channels_last)
    trainer = Trainer(model, config, config.train.batch_size)
    companion, device = model.companion, trainer.device
    size, side = config.train.batch_size, config.model.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), dtype=np.uint8)
    x = to_batch(pixels, device)
    noise = torch.randn(size, config.model.latent_dim, device=device)

    def step() -> None:
        trainer.optimiser.zero_grad()
        trainer.losses(x, noise).total.backward()
        trainer.optimiser.step()

    if companion is None:
        return [step]
    other = AdamW([companion], 1e-3, 1e-4, lowers(config.train, device))
    small, same = companion.reduced(x), torch.zeros(size, dtype=torch.long, device=device)

    def companion_step() -> None:
        with trainer.precision:
            loss = pretext_loss(companion, small, same, same)
        other.zero_grad()
        loss.backward()
        other.step()

    return [step, companion_step]


class Files(Dataset[Tensor]):
    """The textbook's data set: open, resize, to a float tensor, one image at a time."""

    def __init__(self, paths: tuple[Path, ...], side: int) -> None:
        self.paths, self.side = paths, side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            small = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def textbook_loss(model: VAE, x: Tensor) -> Tensor:
    """The losses of both networks on a batch, added; images changed one by one, by plain torch."""
    companion = model.companion
    assert companion is not None
    orders = torch.randint(len(ORDERS), (len(x),))
    turns = torch.randint(len(TURNS), (len(x),))
    noise = torch.randn(len(x), model.config.latent_dim)
    small = F.interpolate(x, size=(companion.SIDE, companion.SIDE), mode="area")
    kinds = zip(small, orders.tolist(), turns.tolist(), strict=True)
    changed = [image[list(ORDERS[k])].rot90(t, dims=(1, 2)) for image, k, t in kinds]
    order, turn = companion(torch.stack(changed))
    told = F.nll_loss(order, orders) + F.nll_loss(turn, turns)
    return losses(model, x, 1.0, noise).total + told


def textbook(photographs: tuple[Path, ...], side: int, steps: int) -> Once:
    """Seconds of the same model in float32, contiguous, fed from the photographs by a DataLoader."""
    model = fresh(settings(side), torch.contiguous_format)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    paths = photographs * (steps * 32 // len(photographs) + 1)
    loader = DataLoader(
        Files(paths[: steps * 32], side), 32, shuffle=True, drop_last=True, num_workers=2
    )

    def epoch() -> None:
        for x in loader:
            optimiser.zero_grad()
            textbook_loss(model, x).backward()
            optimiser.step()

    return timed(epoch)


def rows(material: Material, peers: dict[str, Peer]) -> Iterator[Row]:
    """Every row about training."""
    for side in SIDES:
        steps, slow = EPOCHS * STEPS[side], SLOW_STEPS[side]
        count = steps * 32
        real = loop(material, settings(side, EPOCHS), STEPS[side])
        told = interleaved({"loop": real, "bare": bare(settings(side), steps)}, ROUNDS)
        yield compared(
            f"train {side} px, loop against bare step",
            rates(told["loop"], count),
            rates(told["bare"], count),
            unit="images/s",
            bar=">= 0.92",
            note="the loop with stop loss and checkpoints; the bare step has one fixed tensor",
        )
        script = Peer(Path(sys.executable), HERE / "textbook.py", material.work / "textbook.log")
        photographs = map(str, material.photographs[: slow * 32])
        contestants: dict[str, Once] = {
            "loop": real,
            "textbook": script.start(str(side), str(slow), *photographs),
        }
        peer = peers.get("pythae")
        if peer is not None:
            pixels = material.work / f"pixels-{side}.npy"
            np.save(pixels, material.decoded(slow * 32, side).pixels)
            contestants["pythae"] = peer.start(str(side), str(pixels))
        told = interleaved(contestants, 3)
        script.stop()
        if peer is not None:
            peer.stop()
        against: dict[str, Any] = {
            "textbook": (
                ">= 4",
                "a script of its own: fp32, contiguous, DataLoader of 2 workers, Pillow",
            ),
            "pythae": (">= 3", "BaseTrainer, the same network and losses, pixels in memory"),
        }
        for name, (bar, note) in against.items():
            if name in told:
                yield compared(
                    f"train {side} px, loop against {name}",
                    rates(told["loop"], count),
                    rates(told[name], slow * 32),
                    unit="images/s",
                    bar=bar,
                    note=note,
                )
