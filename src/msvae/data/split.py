"""Train, stop and conformal parts, decided by content or by group: copies never straddle."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msvae.core.errors import ConfigError, DataError

CONFORMAL = 0.15
STOP = 0.05
MINIMUM = 20  # distinct images


@dataclass(frozen=True)
class Split:
    """Indices of the images of each part; together every image once."""

    train: tuple[int, ...]
    stop: tuple[int, ...]
    conformal: tuple[int, ...]


def split_by_content(
    digests: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    conformal: float = CONFORMAL,
    stop: float = STOP,
) -> Split:
    """Order the distinct contents (or groups) by sha256; 15 % conformal, of the rest 5 % stop.

    Groups that share a content are one group. Raises `DataError` when there are too few.
    """
    if len(set(digests)) < MINIMUM:
        raise DataError(
            f"{len(set(digests))} distinct images are too few to train, stop and calibrate on: "
            f"at least {MINIMUM} are needed"
        )
    keys = list(digests) if groups is None else _merged(digests, groups)
    order = sorted(set(keys), key=lambda k: k if groups is None else text_sha256(k))
    if len(order) < 3:
        raise DataError(f"--group-by makes {len(order)} groups: at least 3 are needed, one a part")
    held = set(order[: _share(conformal, len(order))])
    rest = order[len(held) :]
    stopping = set(rest[: _share(stop, len(rest))])

    def rows(part: set[str]) -> tuple[int, ...]:
        return tuple(i for i, k in enumerate(keys) if k in part)

    return Split(rows(set(rest) - stopping), rows(stopping), rows(held))


def _share(share: float, n: int) -> int:
    """⌈share · n⌉ free of the rounding of 0.15 · 20; at least 1, and at least 1 is left."""
    return min(max(math.ceil(round(share * n, 9)), 1), n - 1)


def text_sha256(text: str) -> str:
    """The sha256 that orders contents and groups, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _merged(digests: Sequence[str], groups: Sequence[str]) -> list[str]:
    """The group of each image, groups that share a content joined under the least name."""
    leader = {g: g for g in groups}

    def find(g: str) -> str:
        while leader[g] != g:
            g = leader[g]
        return g

    first: dict[str, str] = {}
    for content, group in zip(digests, groups, strict=True):
        a, b = find(first.setdefault(content, group)), find(group)
        leader[max(a, b)] = min(a, b)
    return [find(g) for g in groups]


def group_names(paths: Sequence[str], pattern: str) -> list[str]:
    """The group of each path: the expression's first bracket, or its whole match."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-by {pattern!r} is not a regular expression: {error}") from error
    names = []
    for path in paths:
        match = expression.search(Path(path).as_posix())
        if match is None:
            raise DataError(
                f"--group-by {pattern!r} matches nothing in {path}: widen the expression"
            )
        names.append((match.group(1) if expression.groups else None) or match.group(0))
    return names


def number_gap_groups(names: Sequence[str], gap: int = 200) -> list[str]:
    """Groups of files that are numbered closely, each called after its first file.

    Sorted by the last number in the name; a jump of more than `gap` begins a new group.
    """
    numbers = [_last_number(name) for name in names]
    order = sorted(range(len(names)), key=lambda i: (numbers[i], names[i]))
    groups = [""] * len(names)
    for before, now in zip([None, *order], order, strict=False):
        begins = before is None or numbers[now] - numbers[before] > gap
        groups[now] = Path(names[now]).name if begins or before is None else groups[before]
    return groups


def _last_number(name: str) -> int:
    digits = re.findall(r"\d+", Path(name).stem)
    if not digits:
        raise DataError(f"{name}: has no number to group it by: rename it, or group otherwise")
    return int(digits[-1])
