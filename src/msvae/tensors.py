"""Frozen dataclasses of tensors and numbers: to a device, to named tensors, and back."""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from msvae.errors import RunError

T = TypeVar("T")


def to_device(part: T, device: torch.device) -> T:
    """A copy of the dataclass with every tensor in it on `device`."""
    moved: dict[str, Any] = {}
    for f in fields(part):  # type: ignore[arg-type]
        value = getattr(part, f.name)
        if isinstance(value, Tensor):
            value = value.to(device)
        elif is_dataclass(value):
            value = to_device(value, device)
        moved[f.name] = value
    return type(part)(**moved)


def flatten(part: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor and number of the dataclass under its dotted name."""
    flat: dict[str, Tensor] = {}
    for f in fields(part):
        value, name = getattr(part, f.name), prefix + f.name
        if isinstance(value, Tensor):
            flat[name] = value.detach().cpu().contiguous()
        elif is_dataclass(value):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = torch.tensor(value, dtype=torch.float64)
    return flat


def unflatten(cls: type[T], flat: dict[str, Tensor], prefix: str = "") -> T:
    """The dataclass back from `flatten`; `RunError` names a tensor that is missing."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint) and isinstance(hint, type):
            values[name] = unflatten(hint, flat, f"{prefix}{name}.")
            continue
        if prefix + name not in flat:
            raise RunError(f"the run lacks the tensor {prefix + name}: fit it again")
        value = flat[prefix + name]
        values[name] = value if hint is Tensor else hint(value.item())
    return cls(**values)
