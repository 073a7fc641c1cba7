"""Dataclasses of tensors, arrays and numbers become named arrays and come back as they were."""

from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from msvae.core.errors import RunError
from msvae.core.state import as_array, as_tensor, flatten, to_device, under, unflatten


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
    table: NDArray[np.float64]
    alpha: float


DTYPES = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


def outer(alpha=0.6, n=3, dtype=torch.float32):
    values = torch.arange(6).to(dtype).view(2, 3)
    inner, other = Inner(values, n), Inner(values[:, :1], n + 1)
    return Outer(inner, other, torch.tensor(0.1), np.linspace(0, 1, 6).reshape(3, 2), alpha)


def same(a, b):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.numpy().tobytes() == y.numpy().tobytes()
        elif isinstance(x, np.ndarray):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        elif isinstance(x, Inner):
            same(x, y)
        else:
            assert (type(x), x) == (type(y), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype):
    """Every tensor and array to the bit, every number with its type."""
    part = outer(dtype=dtype)
    assert all(isinstance(array, np.ndarray) for array in flatten(part).values())
    same(part, unflatten(Outer, flatten(part)))


@given(st.floats(allow_nan=False), st.integers(-(2**53), 2**53))
def test_numbers_come_back_exactly(alpha, n):
    """No float or count loses a digit."""
    back = unflatten(Outer, flatten(outer(alpha, n - 1)))
    assert back.alpha == alpha
    assert back.other.n == n


def test_names_are_dotted():
    """A file shows where each tensor belongs, under the prefix that was asked for."""
    parts = {"inner.weights", "inner.n", "other.weights", "other.n", "scale", "table", "alpha"}
    flat = flatten(outer(), "s.")
    assert set(flat) == {f"s.{part}" for part in parts}
    same(outer(), unflatten(Outer, flat | {"t": np.zeros(1)}, "s."))
    assert set(under(flat | {"t": np.zeros(1)}, "s.")) == parts


def test_what_is_written_is_plain_memory():
    """Views and tensors with gradients become contiguous arrays of the same values."""
    values = torch.arange(12.0).view(4, 3).requires_grad_().T
    flat = flatten(Inner(values, 1))["weights"]
    assert flat.flags.c_contiguous
    np.testing.assert_array_equal(flat, np.arange(12.0).reshape(4, 3).T)
    assert as_array(np.arange(12).reshape(4, 3).T).flags.c_contiguous


def test_a_tensor_has_memory_of_its_own():
    """What is read from a file, which may be mapped and read-only, is not written to."""
    array = np.arange(3.0)
    array.flags.writeable = False
    tensor = as_tensor(array)
    tensor += 1
    assert array.tolist() == [0, 1, 2]
    assert tensor.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["inner.weights", "other.n", "scale", "table", "alpha"])
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
