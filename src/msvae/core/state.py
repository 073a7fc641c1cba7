"""Frozen dataclasses of tensors, arrays and numbers: to a device, to named arrays, and back.

torch is imported only where a dataclass holds tensors: a verdict is read without it.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]


def to_device(part: T, device: "torch.device") -> T:
    """A copy of the dataclass with every tensor in it on `device`."""
    moved: dict[str, Any] = {}
    for f in fields(part):  # type: ignore[arg-type]
        value = getattr(part, f.name)
        if is_dataclass(value):
            value = to_device(value, device)
        elif hasattr(value, "to"):
            value = value.to(device)
        moved[f.name] = value
    return type(part)(**moved)


def flatten(part: Any, prefix: str = "") -> Arrays:
    """Every tensor, array and number of the dataclass under its dotted name."""
    flat: Arrays = {}
    for f in fields(part):
        value, name = getattr(part, f.name), prefix + f.name
        if is_dataclass(value):
            flat |= flatten(value, name + ".")
        elif isinstance(value, int | float):
            flat[name] = np.array(value, dtype=np.float64)
        else:
            flat[name] = as_array(value)
    return flat


def unflatten(cls: type[T], flat: Mapping[str, NDArray[Any]], prefix: str = "") -> T:
    """The dataclass back from `flatten`; `RunError` names an array that is missing."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint) and isinstance(hint, type):
            values[name] = unflatten(hint, flat, f"{prefix}{name}.")
            continue
        if prefix + name not in flat:
            raise RunError(f"the run lacks the tensor {prefix + name}: fit it again")
        array = flat[prefix + name]
        if get_origin(hint) is np.ndarray:
            values[name] = array
        else:
            values[name] = hint(array.item()) if hint in (int, float) else as_tensor(array)
    return cls(**values)


def as_array(value: Any) -> NDArray[Any]:
    """A tensor or an array as a contiguous array."""
    array = value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
    return np.ascontiguousarray(array).reshape(array.shape)  # a number stays one


def as_tensor(array: NDArray[Any]) -> "torch.Tensor":
    """An array as a tensor of its own memory."""
    import torch

    return torch.from_numpy(np.array(array))


def under(flat: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What stands under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
