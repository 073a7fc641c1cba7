"""Training: the real loop against a bare step, against the textbook's loop, against pythae."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bench.material import SIDES, Material
from bench.peers import Peer
from bench.rows import Once, Row, compared, interleaved, rates, timed
from msvae import store
from msvae.compute import choose_device, to_batch
from msvae.config import Config
from msvae.data.images import load_image
from msvae.model import ORDERS, TURNS, VAE
from msvae.train import State, Trainer, losses, train, train_inspector

STEPS = 50  # of a round of the fast contestants
SLOW_STEPS = 12  # of a round of the slow ones
STOP_SHARE = 0.05


def settings(side: int) -> Config:
    """The default preset: one epoch of so many steps."""
    return Config().replace(image_size=side, epochs=1, min_steps=0)


def fresh(side: int, memory: torch.memory_format) -> VAE:
    """A model with random weights, in training mode."""
    torch.manual_seed(0)
    model = VAE(settings(side).model).to(choose_device())
    return model.to(memory_format=memory).train()  # type: ignore[call-overload]


def loop(material: Material, side: int, steps: int) -> Once:
    """Seconds of `train` on the decoded cache, with stop loss and checkpoint, as `fit` calls it."""
    config = settings(side)
    count = steps * config.train.batch_size
    held = round(STOP_SHARE * count)
    decoded = material.decoded(count + held, side)
    parts = decoded.some(range(count)), decoded.some(range(count, count + held))
    model = fresh(side, torch.channels_last)

    def save(state: State) -> None:
        numbers = {"history": state.history}
        store.write_checkpoint(material.work / "checkpoint", state.tensors, numbers)

    return timed(lambda: train(model, *parts, config, save=save))


def bare(side: int, steps: int) -> Once:
    """Seconds of forward, backward and optimiser on one tensor that never changes.

    No decoding, no augmentation, no clipping, no logging: what the arithmetic alone takes.
    """
    model = fresh(side, torch.channels_last)
    trainer = Trainer(model, settings(side), steps * 32)
    x = _batch(side, trainer.device)
    noise = torch.randn(len(x), model.config.latent_dim, device=trainer.device)
    orders = torch.zeros(len(x), dtype=torch.long, device=trainer.device)
    shown = None if model.companion is None else model.companion.reduced(x)

    def step() -> None:
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.low_precision):
            loss = losses(model, x, 1.0, noise, orders, orders, shown)
        trainer.optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        trainer.optimiser.step()

    return timed(lambda: [step() for _ in range(steps)])


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
        pixels = load_image(self.paths[index], self.side)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def textbook(material: Material, side: int, steps: int) -> Once:
    """Seconds of the same model in float32, contiguous, fed from the photographs by a DataLoader."""
    model = fresh(side, torch.contiguous_format)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    paths = material.photographs * (steps * 32 // len(material.photographs) + 1)
    loader = DataLoader(
        Files(paths[: steps * 32], side), 32, shuffle=True, drop_last=True, num_workers=2
    )

    def epoch() -> None:
        for x in loader:
            orders = torch.randint(len(ORDERS), (len(x),))
            turns = torch.randint(len(TURNS), (len(x),))
            noise = torch.randn(len(x), model.config.latent_dim)
            loss = losses(model, x, 1.0, noise, orders, turns)
            optimiser.zero_grad()
            loss.total.backward()
            optimiser.step()

    return timed(epoch)


def inspector(material: Material, side: int, steps: int) -> Once:
    """Seconds of `train_inspector`, which has a loop of its own."""
    config = settings(side).replace(inspector_steps=steps)
    decoded = material.decoded(STEPS * 32, side)
    model = fresh(side, torch.channels_last)
    return timed(lambda: train_inspector(model, decoded.some(range(STEPS * 32)), config))


def bare_inspector(side: int, steps: int) -> Once:
    """The same arithmetic on one tensor and one mask."""
    model = fresh(side, torch.channels_last)
    trainer = Trainer(model, settings(side), steps * 32)
    x = _batch(side, trainer.device)[: 32 if side <= 64 else 16]
    mask = (x[:, 0] > 0.9).float()
    assert model.inspector is not None
    inner = model.inspector
    optimiser = torch.optim.AdamW(inner.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.low_precision):
            odds = inner(x)
        loss = F.binary_cross_entropy_with_logits(odds.float(), mask)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return timed(lambda: [step() for _ in range(steps)])


def rows(material: Material, peers: dict[str, Peer]) -> Iterator[Row]:
    """Every row about training."""
    for side in SIDES:
        real = loop(material, side, STEPS)
        told = interleaved({"loop": real, "bare": bare(side, STEPS)}, 5)
        count = STEPS * 32
        yield compared(
            f"train {side} px, loop against bare step",
            rates(told["loop"], count),
            rates(told["bare"], count),
            unit="images/s",
            bar=">= 0.92",
            note="the loop with stop loss and checkpoint; the bare step has one fixed tensor",
        )
        told = interleaved(
            {"loop": inspector(material, side, STEPS), "bare": bare_inspector(side, STEPS)}, 3
        )
        yield compared(
            f"train {side} px, inspector's loop against bare step",
            rates(told["loop"], STEPS),
            rates(told["bare"], STEPS),
            unit="steps/s",
            bar="",
            note="imagining the defects is part of the loop, nothing of it of the bare step",
        )
        contestants: dict[str, Once] = {
            "loop": loop(material, side, SLOW_STEPS),
            "textbook": textbook(material, side, SLOW_STEPS),
        }
        peer = peers.get("pythae")
        if peer is not None:
            pixels = material.work / f"pixels-{side}.npy"
            np.save(pixels, material.decoded(SLOW_STEPS * 32, side).pixels)
            contestants["pythae"] = peer.start(str(side), str(pixels))
        told = interleaved(contestants, 3)
        if peer is not None:
            peer.stop()
        count = SLOW_STEPS * 32
        against: dict[str, Any] = {
            "textbook": (">= 4", "fp32, contiguous, DataLoader of 2 workers over the photographs"),
            "pythae": (">= 3", "BaseTrainer, the same network and losses, pixels in memory"),
        }
        for name, (bar, note) in against.items():
            if name in told:
                yield compared(
                    f"train {side} px, loop against {name}",
                    rates(told["loop"], count),
                    rates(told[name], count),
                    unit="images/s",
                    bar=bar,
                    note=note,
                )
