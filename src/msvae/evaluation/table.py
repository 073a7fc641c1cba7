"""ScoreTable: one row an image, CSV on disk; the plain hinge between scoring and judging."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import DataError, ImageError
from msvae.core.files import write_table

Floats = NDArray[np.float64]
BLOCK = 1000  # rows written at a time


@dataclass(frozen=True)
class ScoreTable:
    """N images with their scores, p-values and decisions; labels where they are known."""

    paths: tuple[str, ...]
    scores: dict[str, Floats]  # each (N,), higher is more anomalous
    p_values: dict[str, Floats] = field(default_factory=dict)  # each (N,), in (0, 1]
    p: Floats | None = None  # (N,) of the fused score
    flagged: NDArray[np.bool_] | None = None  # (N,)
    labels: NDArray[np.int64] | None = None  # (N,) 0 normal, 1 anomalous
    kinds: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "ScoreTable":
        """The table of some rows, by indices or by a mask."""
        index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return ScoreTable(
            paths=tuple(self.paths[i] for i in index),
            scores={k: v[index] for k, v in self.scores.items()},
            p_values={k: v[index] for k, v in self.p_values.items()},
            p=None if self.p is None else self.p[index],
            flagged=None if self.flagged is None else self.flagged[index],
            labels=None if self.labels is None else self.labels[index],
            kinds=None if self.kinds is None else tuple(self.kinds[i] for i in index),
        )

    def columns(self) -> dict[str, Sequence[object]]:
        """Every column of the CSV file, in its order."""
        out: dict[str, Sequence[object]] = {"path": self.paths}
        if self.labels is not None:
            out["label"] = self.labels.tolist()
        if self.kinds is not None:
            out["kind"] = self.kinds
        out |= {name: values.tolist() for name, values in self.scores.items()}
        out |= {f"p_{name}": values.tolist() for name, values in self.p_values.items()}
        if self.p is not None:
            out["p"] = self.p.tolist()
        if self.flagged is not None:
            out["flagged"] = self.flagged.astype(int).tolist()
        return out

    def write_csv(self, path: Path, *, bom: bool = False) -> None:
        """Write the table atomically; floats come back to the bit. `bom` is Excel's wish."""
        write_table(path, self.lines(), bom=bom)

    def lines(self) -> Iterator[Sequence[object]]:
        """The names of the columns, then the cells of each image.

        A block at a time: as Python objects all numbers together would be large.
        """
        for first in range(0, max(len(self), 1), BLOCK):
            part = self.select(np.arange(first, min(first + BLOCK, len(self)))).columns()
            if first == 0:
                yield list(part)
            yield from zip(*part.values(), strict=True)

    @classmethod
    def read_csv(cls, path: Path) -> "ScoreTable":
        """A table from any CSV file with a `path` column and numeric columns."""
        header, rows = _read(path)
        column = {name: [row[i] for row in rows] for i, name in enumerate(header)}
        plain = {"path", "label", "kind", "p", "flagged"}
        numbers = {k: _numbers(path, k, v) for k, v in column.items() if k not in {"path", "kind"}}
        names = [k for k in header if k not in plain]
        tails = [k for k in names if k.startswith("p_") and k[2:] in names]
        return cls(
            paths=tuple(column["path"]),
            scores={k: numbers[k] for k in names if k not in tails},
            p_values={k[2:]: numbers[k] for k in tails},
            p=numbers.get("p"),
            flagged=_binary(path, numbers, "flagged", "a decision", np.bool_),
            labels=_binary(path, numbers, "label", "a label", np.int64),
            kinds=tuple(column["kind"]) if "kind" in column else None,
        )


def write_quarantine(path: Path, refused: Sequence[ImageError]) -> None:
    """The images that could not be used, each with its reason, as CSV."""
    write_table(path, quarantine_table(refused))


def quarantine_table(refused: Sequence[ImageError]) -> list[list[str]]:
    """A head, and a row for each image that could not be used."""
    return [["path", "reason"], *[[e.name, e.reason] for e in refused]]


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except csv.Error as error:
        raise DataError(f"{path}: is not a CSV file of scores: {error}") from error
    if rows and len(set(rows[0])) < len(rows[0]):
        raise DataError(f"{path}: names a column twice: rename one of them")
    if not rows or "path" not in rows[0]:
        raise DataError(f"{path}: has no column `path`: name a file that msvae score wrote")
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise DataError(f"{path}, line {line}: has {len(row)} cells instead of {len(rows[0])}")
    return rows[0], rows[1:]


def _binary(path: Path, columns: dict[str, Floats], name: str, what: str, kind: Any) -> Any:
    """The column as this type, where there is one."""
    if name not in columns:
        return None
    if not np.isin(columns[name], (0, 1)).all():
        raise DataError(f"{path}: has {what} that is neither 0 (normal) nor 1 (anomalous)")
    return columns[name].astype(kind)


def _numbers(path: Path, name: str, cells: Sequence[str]) -> Floats:
    values = np.empty(len(cells))
    for i, cell in enumerate(cells):
        try:
            values[i] = float(cell)
        except ValueError as error:
            raise DataError(
                f"{path}, line {i + 2}: {name} is {cell[:40]!r}, not a number"
            ) from error
    return values
