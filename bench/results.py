"""What is told of the rows: the machine they were measured on, a table, and the JSON file."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.rows import Row
from msvae.core.files import write_json
from msvae.core.processor import cores, instruction_set

ANSWERS = {True: "yes", False: "NO", None: "–"}


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it is."""
    return {
        "cpu": _cpu(),
        "instruction_set": instruction_set(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "openvino": version("openvino"),
        "python": platform.python_version(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(path: Path, rows: Sequence[Row]) -> None:
    """The rows so far as `results.json`."""
    write_json(path, {"version": 1, "machine": machine(), "rows": [r.to_json() for r in rows]})


def table(rows: Sequence[Row]) -> Table:
    """The rows as people read them."""
    out = Table(title="Speed and memory")
    for column in ("what", "value", "against", "ratio", "spread", "bar", "holds"):
        out.add_column(column, justify="left" if column == "what" else "right")
    for r in rows:
        spread = "–" if r.spread is None else " … ".join(f"{x:.3g}" for x in r.spread)
        value = "–" if r.value is None else f"{r.value:.4g} {r.unit}"
        against, ratio = number(r.against, 4), number(r.ratio, 3)
        out.add_row(r.name, value, against, ratio, spread, r.bar, ANSWERS[r.holds])
    return out


def number(value: float | None, digits: int) -> str:
    """So many digits of it; a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}g}"


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, and how many rows miss their bar."""
    console.width = max(console.width, 140)
    console.print(table(rows))
    failed = [r for r in rows if r.holds is False]
    if failed:
        console.print(f"{len(failed)} of {len(rows)} rows miss their bar")
