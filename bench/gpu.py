"""On a GPU: the `seed` preset at 224 px, and what part of the card's bfloat16 rate it reaches.

That rate is the one of a large matrix product on the same card, in turns with the work.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.material import Material
from bench.peers import Peers
from bench.rows import Once, Row, compared, interleaved, rates, timed
from bench.scoring import against_ideal
from bench.training import bare, bare_steps, loop
from msvae.core.config import preset
from msvae.core.device import batch_size, choose_device, to_batch
from msvae.run.fit import fit

SEED = preset("seed")
STEPS, EPOCHS = 32, 2  # of an epoch of the loop; of a round
SIZE, PRODUCTS = 8192, 40  # of the matrices, a side; of a round
FITTED, SCORED = 640, 2048  # images
ROUNDS = 5


def products(device: torch.device) -> Once:
    """Operations a second of products of large bfloat16 matrices."""
    a, b = (torch.randn(SIZE, SIZE, device=device).bfloat16() for _ in range(2))
    seconds = timed(lambda: [a @ b for _ in range(PRODUCTS)])
    return lambda: 2 * SIZE**3 * PRODUCTS / seconds()


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions of the work, forward and back."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def rows(material: Material, peers: Peers) -> Iterator[Row]:
    """Every row about the GPU; none without one."""
    del peers
    device = choose_device()
    if device.type == "cuda":
        yield from _training(material, device)
        yield from _scoring(material, device)


def _training(material: Material, device: torch.device) -> Iterator[Row]:
    config = SEED.replace(epochs=EPOCHS, min_steps=0)
    steps, size = EPOCHS * STEPS, config.train.batch_size
    (step,) = bare_steps(config)
    each = operations(step) / size
    contestants = {
        "loop": loop(material, config, STEPS),
        "bare": bare(config, steps),
        "products": products(device),
    }
    measured = interleaved(contestants, ROUNDS)
    ours = rates(measured["loop"], steps * size)
    yield compared(
        "train 224 px, seed preset, loop against bare step",
        ours,
        rates(measured["bare"], steps * size),
        unit="images/s",
        bar="",
        note=torch.cuda.get_device_name(device),
    )
    yield _of_products("train 224 px, seed preset", ours, measured["products"], each)


def _scoring(material: Material, device: torch.device) -> Iterator[Row]:
    few = SEED.replace(epochs=1, min_steps=0)
    detector = fit(material.many(FITTED, SEED.model.image_size), config=few)
    side = detector.config.model.image_size
    size = batch_size(side, device)
    pixels = material.decoded(SCORED, side).some(range(SCORED))
    batches = [pixels[i : i + size] for i in range(0, SCORED, size)]
    forward = partial(detector.graph.torch_graph().networks, to_batch(batches[0], device))
    with torch.inference_mode():
        each = operations(forward) / len(batches[0])
    work = {"scores": timed(lambda: detector.score_pixels(batches)), "products": products(device)}
    measured = interleaved(work, ROUNDS)
    name = "score 224 px, seed preset, all scores of decoded images"
    yield _of_products(name, rates(measured["scores"], SCORED), measured["products"], each)
    yield against_ideal(material, detector)


def _of_products(name: str, ours: list[float], rate: list[float], each: float) -> Row:
    """The rate of our images against what the products' rate would allow."""
    return compared(
        f"{name}, against the rate of bfloat16 products",
        ours,
        [r / each for r in rate],
        unit="images/s",
        bar="",
        note=f"networks: {each / 1e9:.1f} GFLOP an image; products: {median(rate) / 1e12:.0f} TFLOP/s",
    )
