"""Threads, batches, precision: several batches at a time give what one after the other gives."""

import threading
import time

import numpy as np
import pytest
import torch

from msvae.core import device
from msvae.core.config import Config
from msvae.core.device import BATCH, autocast, batch_size, to_batch
from msvae.run.batching import batch_ranges, in_parallel

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order(count, workers):
    """Whatever finishes first."""

    def work(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(in_parallel(work, range(count), workers)) == [i * i for i in range(count)]


def test_few_are_taken_ahead():
    """Memory stays that of a few batches: no more are drawn than are under way."""
    drawn, gaps = [], []

    def items():
        for i in range(30):
            drawn.append(i)
            yield i

    for done, _ in enumerate(in_parallel(lambda i: i, items(), 2)):
        gaps.append(len(drawn) - done)
    assert max(gaps) <= 4


def test_several_threads_work():
    """Two workers are at work at the same time, and neither is the caller's thread."""
    seen = set()
    both = threading.Barrier(2, timeout=20)

    def work(i):
        both.wait()
        seen.add(threading.get_ident())

    list(in_parallel(work, range(6), 2))
    assert len(seen) == 2
    assert threading.get_ident() not in seen


@pytest.mark.parametrize("count, workers", [(1, 4), (5, 1)])
def test_no_thread_is_started_for_nothing(count, workers):
    """A single item, or a single worker, is the caller's own work."""
    seen = set(in_parallel(lambda i: threading.get_ident(), range(count), workers))
    assert seen == {threading.get_ident()}


def test_an_error_reaches_the_caller():
    """That of the first item that failed."""

    def work(i):
        if i == 3:
            raise ValueError("the third")
        return i

    with pytest.raises(ValueError, match="the third"):
        list(in_parallel(work, range(9), 2))


@pytest.mark.parametrize(
    ("side", "count"), [(32, BATCH), (64, BATCH), (128, 48), (256, 12), (1024, 1)]
)
def test_larger_images_come_fewer_at_a_time(side, count):
    """As many as hold the pixels of 192 images of 64 px, and at least one; on a GPU no fewer."""
    assert batch_size(side, CPU) == count
    assert batch_size(side, torch.device("cuda")) >= count


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 32, 96, 241, 1000])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_images_are_shared_out_evenly(count, workers):
    """All of them in order, full shares first, as many for each worker; the rest evenly."""
    found = batch_ranges(count, 16, workers)
    assert [i for share in found for i in share] == list(range(count))
    sizes = [len(share) for share in found]
    full, rest = (
        sizes[: count // (16 * workers) * workers],
        sizes[count // (16 * workers) * workers :],
    )
    assert set(full) <= {16}
    assert sum(rest) < 16 * workers
    assert len(rest) == min(workers, sum(rest))
    assert not rest or max(rest) - min(rest) <= 1


@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_the_precision_that_is_asked_for(monkeypatch, precision, processor):
    """`fp32` and `bf16` are kept; `auto` is bfloat16 where the processor multiplies it itself."""
    monkeypatch.setattr(device, "has_bfloat16", lambda: processor)
    layer, x = torch.nn.Linear(4, 4), torch.zeros(2, 4)
    with autocast(Config().replace(precision=precision).train, CPU):
        out = layer(x)
    low = processor if precision == "auto" else precision == "bf16"
    assert out.dtype == (torch.bfloat16 if low else torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_bfloat16():
    """Unless the settings say otherwise."""
    x = torch.zeros(4, 4, device="cuda")
    with autocast(Config().train, x.device):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(Config().replace(precision="fp32").train, x.device):
        assert (x @ x).dtype == torch.float32


def test_pixels_become_a_batch():
    """Channels first, in [0, 1]."""
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    x = to_batch(pixels, CPU)
    np.testing.assert_allclose(x.numpy(), pixels.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
