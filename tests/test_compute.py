"""Threads, batches, precision: several batches at a time give what one after the other gives."""

import threading
import time

import numpy as np
import pytest
import torch

from msvae.compute import (
    BATCH,
    batch_of,
    compute_type,
    decoding,
    in_parallel,
    scanned,
    shares,
    to_batch,
    workers_on,
)
from msvae.config import Config

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order(count, workers):
    """Whatever finishes first."""

    def work(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(in_parallel(work, range(count), CPU, workers)) == [i * i for i in range(count)]


def test_few_are_taken_ahead():
    """Memory stays that of a few batches: no more are drawn than are under way."""
    drawn, gaps = [], []

    def items():
        for i in range(30):
            drawn.append(i)
            yield i

    for done, _ in enumerate(in_parallel(lambda i: i, items(), CPU, 2)):
        gaps.append(len(drawn) - done)
    assert max(gaps) <= 4


def test_several_threads_work_and_their_number_stays_ours():
    """Two workers, two threads; afterwards torch has the threads that it had."""
    before, seen = torch.get_num_threads(), set()
    both = threading.Barrier(2, timeout=20)

    def work(i):
        both.wait()
        seen.add(threading.get_ident())

    list(in_parallel(work, range(6), CPU, 2))
    assert len(seen) == 2
    assert threading.get_ident() not in seen
    assert torch.get_num_threads() == before


def test_an_error_reaches_the_caller():
    """That of the first item that failed."""

    def work(i):
        if i == 3:
            raise ValueError("the third")
        return i

    with pytest.raises(ValueError, match="the third"):
        list(in_parallel(work, range(9), CPU, 2))


@pytest.mark.parametrize(
    ("side", "count"), [(32, BATCH), (64, BATCH), (128, 48), (256, 12), (1024, 1)]
)
def test_larger_images_come_fewer_at_a_time(side, count):
    """As many as hold the pixels of 192 images of 64 px, and at least one."""
    assert batch_of(side, CPU) == count
    assert scanned(side, CPU) == min(count, 48)
    assert scanned(side, torch.device("cuda")) == batch_of(side, torch.device("cuda")) >= count


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 32, 96, 241, 1000])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_images_are_shared_out_evenly(count, workers):
    """All of them in order, full shares first, as many for each worker; the rest evenly."""
    found = shares(count, 16, workers)
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


def test_how_many_batches_are_scored_side_by_side():
    """One for each of a few cores; a GPU shares out its work itself and has another one waiting."""
    before = torch.get_num_threads()
    try:
        for cores, on_cpu, on_gpu in ((1, 1, 1), (2, 2, 2), (16, 4, 2)):
            torch.set_num_threads(cores)
            assert workers_on(CPU) == on_cpu
            assert workers_on(torch.device("cuda")) == on_gpu
            assert workers_on(torch.device("mps")) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_precision_that_is_asked_for(device):
    """`fp32` and `bf16` are kept everywhere; `auto` is bfloat16 on a GPU."""
    for name, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = Config().replace(precision=name).train
        assert compute_type(config, torch.device(device)) is wanted
    assert compute_type(Config().train, torch.device("cuda")) is torch.bfloat16


def test_pixels_become_a_batch():
    """Channels first, in [0, 1]."""
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    x = to_batch(pixels, CPU)
    np.testing.assert_allclose(x.numpy(), pixels.transpose(0, 3, 1, 2) / 255, rtol=1e-6)


@pytest.mark.parametrize(("cores", "ahead"), [(1, False), (2, False), (4, False), (8, True)])
def test_files_are_decoded_ahead_where_a_batch_has_several_cores(cores, ahead, monkeypatch):
    """Or for a GPU; else by the thread that scores them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    for device, pool in ((CPU, ahead), (torch.device("cuda"), True)):
        with decoding(device) as spread:
            here = set(spread(lambda _: threading.get_ident(), range(9)))
            assert list(spread(lambda i: i * i, range(9))) == [i * i for i in range(9)]
        assert (here != {threading.get_ident()}) == pool
