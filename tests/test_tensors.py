"""Dataclasses of tensors go into named tensors and come back as they were."""

from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msvae.errors import RunError
from msvae.tensors import flatten, to_device, unflatten


@dataclass(frozen=True)
class Inner:
    """A part of a part."""

    weights: Tensor
    n: int


@dataclass(frozen=True)
class Outer:
    """What is saved."""

    inner: Inner
    other: Inner
    scale: Tensor
    alpha: float


DTYPES = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


def outer(alpha=0.6, n=3, dtype=torch.float32):
    values = torch.arange(6).to(dtype).view(2, 3)
    return Outer(Inner(values, n), Inner(values[:, :1], n + 1), torch.tensor(0.1), alpha)


def same(a, b):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.numpy().tobytes() == y.numpy().tobytes()
        elif isinstance(x, Inner):
            same(x, y)
        else:
            assert (type(x), x) == (type(y), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype):
    """Every tensor to the bit, every number with its type."""
    part = outer(dtype=dtype)
    same(part, unflatten(Outer, flatten(part)))


@given(st.floats(allow_nan=False), st.integers(-(2**53), 2**53))
def test_numbers_come_back_exactly(alpha, n):
    """No float or count loses a digit."""
    back = unflatten(Outer, flatten(outer(alpha, n - 1)))
    assert back.alpha == alpha
    assert back.other.n == n


def test_names_are_dotted():
    """A file shows where each tensor belongs, under the prefix that was asked for."""
    names = {"s.inner.weights", "s.inner.n", "s.other.weights", "s.other.n", "s.scale", "s.alpha"}
    assert set(flatten(outer(), "s.")) == names
    same(outer(), unflatten(Outer, flatten(outer(), "s.") | {"t": torch.zeros(1)}, "s."))


def test_what_is_written_is_plain_memory():
    """Views and tensors with gradients become contiguous ones without."""
    part = Inner(torch.zeros(4, 3, requires_grad=True).T, 1)
    flat = flatten(part)["weights"]
    assert flat.is_contiguous()
    assert not flat.requires_grad


@pytest.mark.parametrize("name", ["inner.weights", "other.n", "scale", "alpha"])
def test_a_missing_tensor_is_named(name):
    """One line with the name and the remedy."""
    flat = flatten(outer(), "s.")
    del flat["s." + name]
    with pytest.raises(RunError, match=rf"lacks the tensor s\.{name}: fit it again$"):
        unflatten(Outer, flat, "s.")


def test_to_device_moves_every_tensor():
    """Nested ones too; numbers stay, and the original is not touched."""
    part = outer()
    moved = to_device(part, torch.device("meta"))
    tensors = (moved.inner.weights, moved.other.weights, moved.scale)
    assert {t.device.type for t in tensors} == {"meta"}
    assert (moved.inner.n, moved.alpha) == (3, 0.6)
    assert part.scale.device.type == "cpu"
    same(part, to_device(part, torch.device("cpu")))
