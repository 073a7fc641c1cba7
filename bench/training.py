"""Training: the real loops against bare steps, against the textbook's loop, against pythae."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bench.material import SIDES, Material
from bench.peers import HERE, Peer, Peers
from bench.rows import Once, Row, compared, interleaved, missing, rates, timed
from msvae.core.config import Config, TrainConfig
from msvae.core.device import choose_device, to_batch
from msvae.networks.model import Networks
from msvae.networks.pretext import ORDERS, TURNS, pretext_loss
from msvae.run.checkpoint import CheckpointWriter
from msvae.training.auxiliary import train_pretext
from msvae.training.optim import adamw
from msvae.training.vae import Trainer, losses, train

EPOCHS = 2  # of a round of the fast contestants
STEPS = {64: 100, 128: 40}  # of each epoch, by the size of the images
SLOW_STEPS = {64: 25, 128: 10}  # of a round of the slow ones, one epoch
ROUNDS, PEER_ROUNDS = 5, 3
STOP_SHARE = 0.05
BARS = {"textbook": ">= 4", "pythae": ">= 2"}
NOTES = {
    "textbook": "a script of its own: fp32, contiguous, DataLoader of 2 workers, Pillow",
    "pythae": "BaseTrainer, the same networks and losses, pixels in memory",
}


def settings(side: int, epochs: int = 1) -> Config:
    """The default preset, for a few short epochs of the VAE and as many of the pretext network."""
    return Config().replace(
        image_size=side, epochs=epochs, pretext_epochs=epochs, min_steps=0, segmenter=False
    )


def fresh(config: Config, memory: torch.memory_format) -> Networks:
    """Networks with random weights, in training mode."""
    torch.manual_seed(0)
    networks = Networks(config.model).to(choose_device())
    return networks.to(memory_format=memory).train()  # type: ignore[call-overload]


def loop(material: Material, config: Config, steps: int) -> Once:
    """Seconds of both loops, one after the other, on the decoded cache.

    The VAE's measures the stop loss and keeps checkpoints.
    """
    side, count = config.model.image_size, steps * config.train.batch_size
    total = count + round(STOP_SHARE * count)
    decoded = material.decoded(total, side)
    pixels, stop = decoded.some(range(count)), decoded.some(range(count, total))
    networks = fresh(config, torch.channels_last)

    def both() -> None:
        writer = CheckpointWriter(material.work / "kept", {})
        train(networks.vae, pixels, stop, config, save=writer)
        train_pretext(networks, pixels, config)

    return timed(both)


def bare(config: Config, steps: int) -> Once:
    """Seconds of forward, backward and optimiser on one tensor that never changes.

    Of the VAE, then of the pretext network. No decoding, no augmentation, no clipping, no logging:
    what the arithmetic alone takes.
    """
    each = bare_steps(config)

    def both() -> None:
        for one in each:
            for _ in range(steps):
                one()

    return timed(both)


def bare_steps(config: Config) -> list[Callable[[], None]]:
    """A step of the VAE; one of the pretext network, where there is one."""
    networks = fresh(config, torch.channels_last)
    trainer = Trainer(networks.vae, config, config.train.batch_size)
    size, side = config.train.batch_size, config.model.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), dtype=np.uint8)
    x = to_batch(pixels, trainer.device)
    noise = torch.randn(size, config.model.latent_dim, device=trainer.device)

    def step() -> None:
        trainer.optimiser.zero_grad()
        trainer.losses(x, noise).total.backward()
        trainer.optimiser.step()

    return [step, *_bare_pretext_step(networks, trainer, x)]


def _bare_pretext_step(networks: Networks, trainer: Trainer, x: Tensor) -> list[Callable[[], None]]:
    pretext = networks.pretext
    if pretext is None:
        return []
    optimiser = adamw(pretext, 1e-3, 1e-4)
    small = pretext.downsample(x)
    same = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> None:
        with trainer.precision:
            loss = pretext_loss(pretext, small, same, same)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return [step]


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


def textbook_loss(networks: Networks, x: Tensor) -> Tensor:
    """The losses of both networks on a batch, added; images changed one by one, by plain torch."""
    pretext = networks.pretext
    assert pretext is not None
    orders = torch.randint(len(ORDERS), (len(x),))
    turns = torch.randint(len(TURNS), (len(x),))
    noise = torch.randn(len(x), networks.config.latent_dim)
    small = F.interpolate(x, size=(pretext.SIDE, pretext.SIDE), mode="area")
    kinds = zip(small, orders.tolist(), turns.tolist(), strict=True)
    changed = [image[list(ORDERS[k])].rot90(t, dims=(1, 2)) for image, k, t in kinds]
    order, turn = pretext(torch.stack(changed))
    guesses = F.nll_loss(order, orders) + F.nll_loss(turn, turns)
    return losses(networks.vae, x, TrainConfig(), noise).total + guesses


def textbook(photographs: tuple[Path, ...], side: int, steps: int) -> Once:
    """Seconds of the same networks in float32, contiguous, fed from the photographs by a DataLoader."""
    networks = fresh(settings(side), torch.contiguous_format)
    optimiser = torch.optim.AdamW(networks.parameters(), lr=1e-3, weight_decay=1e-4)
    paths = photographs * (steps * 32 // len(photographs) + 1)
    loader = DataLoader(
        Files(paths[: steps * 32], side), 32, shuffle=True, drop_last=True, num_workers=2
    )

    def epoch() -> None:
        for x in loader:
            optimiser.zero_grad()
            textbook_loss(networks, x).backward()
            optimiser.step()

    return timed(epoch)


def rows(material: Material, peers: Peers) -> Iterator[Row]:
    """Every row about training."""
    for side in SIDES:
        real = loop(material, settings(side, EPOCHS), STEPS[side])
        yield _against_bare(side, real)
        yield from _against_others(material, side, real, peers)


def _against_bare(side: int, real: Once) -> Row:
    steps = EPOCHS * STEPS[side]
    seconds = interleaved({"loop": real, "bare": bare(settings(side), steps)}, ROUNDS)
    return compared(
        f"train {side} px, loop against bare step",
        rates(seconds["loop"], steps * 32),
        rates(seconds["bare"], steps * 32),
        unit="images/s",
        bar=">= 0.92",
        note="the loop with stop loss and checkpoints; the bare step has one fixed tensor",
    )


def _against_others(material: Material, side: int, real: Once, peers: Peers) -> Iterator[Row]:
    """The loop against the textbook's script and against pythae, interleaved."""
    slow = SLOW_STEPS[side]
    photographs = map(str, material.photographs[: slow * 32])
    script = Peer(Path(sys.executable), HERE / "textbook.py", material.work / "textbook.log")
    running = [script]
    contestants = {"loop": real, "textbook": script.start(str(side), str(slow), *photographs)}
    pythae = peers.get("pythae")
    if pythae is not None:
        pixels = material.work / f"pixels-{side}.npy"
        np.save(pixels, material.decoded(slow * 32, side).pixels)
        contestants["pythae"] = pythae.start(str(side), str(pixels))
        running.append(pythae)
    seconds = interleaved(contestants, PEER_ROUNDS)
    for peer in running:
        peer.stop()
    ours = rates(seconds.pop("loop"), EPOCHS * STEPS[side] * 32)
    for name, theirs in seconds.items():
        yield compared(
            f"train {side} px, loop against {name}",
            ours,
            rates(theirs, slow * 32),
            unit="images/s",
            bar=BARS[name],
            note=NOTES[name],
        )
    if pythae is None and "pythae" in peers:
        yield missing(
            f"train {side} px, loop against pythae",
            unit="images/s",
            bar=BARS["pythae"],
            note="pythae could not be installed",
        )
