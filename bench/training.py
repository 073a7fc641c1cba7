"""Training: the real loop against a bare step, against the textbook's loop, against pythae."""

import sys
from collections.abc import Iterator
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
from msvae.compute import choose_device, to_batch
from msvae.config import Config
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


def fresh(side: int, memory: torch.memory_format) -> VAE:
    """A model with random weights, in training mode."""
    torch.manual_seed(0)
    model = VAE(settings(side).model).to(choose_device())
    return model.to(memory_format=memory).train()  # type: ignore[call-overload]


def loop(material: Material, side: int, steps: int, epochs: int = 1) -> Once:
    """Seconds of both loops side by side on the decoded cache, with stop loss and checkpoints."""
    config = settings(side, epochs)
    count = steps * config.train.batch_size
    held = round(STOP_SHARE * count)
    decoded = material.decoded(count + held, side)
    parts = decoded.some(range(count)), decoded.some(range(count, count + held))
    model = fresh(side, torch.channels_last)
    assert model.companion is not None

    def train_vae(reached: Reached) -> None:
        train(model, *parts, config, save=Keeper(material.work / "kept", {}), reached=reached)

    def both() -> None:
        with heap.kept():
            teach_both(model, parts[0], config, train_vae)

    return timed(both)


def bare(side: int, steps: int) -> Once:
    """Seconds of forward, backward and optimiser on one tensor that never changes.

    Of the VAE, then of the companion. No decoding, no augmentation, no clipping, no logging: what
    the arithmetic alone takes.
    """
    model = fresh(side, torch.channels_last)
    trainer = Trainer(model, settings(side), steps * 32)
    companion = model.companion
    assert companion is not None
    other = torch.optim.AdamW(companion.parameters(), lr=1e-3, fused=True)
    x = _batch(side, trainer.device)
    small = companion.reduced(x)
    noise = torch.randn(len(x), model.config.latent_dim, device=trainer.device)
    same = torch.zeros(len(x), dtype=torch.long, device=trainer.device)

    def step() -> None:
        trainer.optimiser.zero_grad(set_to_none=True)
        trainer.losses(x, noise).total.backward()
        trainer.optimiser.step()

    def companion_step() -> None:
        with trainer.precision:
            loss = pretext_loss(companion, small, same, same)
        other.zero_grad(set_to_none=True)
        loss.backward()
        other.step()

    def both() -> None:
        for one in (step, companion_step):
            for _ in range(steps):
                one()

    return timed(both)


def _batch(side: int, device: torch.device) -> Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (32, side, side, 3), dtype=np.uint8)
    return to_batch(pixels, device)


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
    model = fresh(side, torch.contiguous_format)
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
        real = loop(material, side, STEPS[side], EPOCHS)
        told = interleaved({"loop": real, "bare": bare(side, steps)}, ROUNDS)
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
