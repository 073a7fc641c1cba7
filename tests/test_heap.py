"""Memory that is kept during a training, and given back during long scoring."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from msvae import heap

SIZE = 4 << 20  # numbers of float32: 16 MB


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is a library of Linux")
def test_memory_is_taken_once_and_given_back():
    """Within it a freed piece serves the next one; at the end the system has it again."""
    with heap.kept():
        for _ in range(8):  # until the pieces have found their places
            pieces = [torch.ones(SIZE) for _ in range(4)]
            del pieces
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            pieces = [torch.ones(SIZE) for _ in range(4)]
            del pieces
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        assert taken < 0.1 * 8 * 4 * SIZE * 4 / resource.getpagesize()  # of the pages in use
        held = resident()
    assert resident() < held - 32


def resident():
    """Anonymous memory of this process, MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))


def test_elsewhere_nothing_is_done(monkeypatch):
    """Not on other systems, nor with another C library."""
    monkeypatch.setattr(heap.sys, "platform", "win32")
    with heap.kept():
        heap.give_back()
    monkeypatch.setattr(heap.sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    with heap.kept():
        heap.give_back()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is a library of Linux")
def test_what_lies_free_between_pieces_is_given_back():
    """Seven of eight pieces of 100 kB, none of which the system has back by itself."""
    pieces = [torch.ones(25_000) for _ in range(800)]
    kept = pieces[::8]
    del pieces
    held = resident()
    heap.give_back()
    assert resident() < held - 40
    assert all(piece.sum() == 25_000 for piece in kept)
