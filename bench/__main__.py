"""`python -m bench`: every row, a table on the screen, and results.json."""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu, memory, peers, scoring, training
from bench.material import Material, prepare
from bench.rows import Row
from msvae.files import write_json

OUT = Path("bench/results.json")
Part = Callable[[Material, dict[str, peers.Peer]], Iterator[Row]]
PARTS: dict[str, Part] = {
    "training": training.rows,
    "scoring": scoring.rows,
    "gpu": gpu.rows,
    "memory": lambda material, _: memory.rows(material),
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as people read them."""
    out = Table(title="Speed and memory")
    for column in ("what", "value", "against", "ratio", "spread", "bar", "holds"):
        out.add_column(column, justify="left" if column == "what" else "right")
    for r in rows:
        spread = f"{r['spread'][0]:.3g} … {r['spread'][1]:.3g}"
        holds = {True: "yes", False: "NO", None: "–"}[r["holds"]]
        value = f"{r['value']:.4g} {r['unit']}"
        out.add_row(
            r["name"], value, f"{r['against']:.4g}", f"{r['ratio']:.3g}", spread, r["bar"], holds
        )
    return out


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("MSVAE_DATA"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, help="keep images, runs and peers here")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--no-peers", action="store_true", help="leave the other programs out")
    options = parser.parse_args()
    console, began = Console(stderr=True), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        data = None if options.data_dir is None else Path(options.data_dir).resolve()
        material = prepare(work, data)
        others = {} if options.no_peers else peers.install(work / "peers", console.print)
        rows = []
        for part in options.only:
            for row in PARTS[part](material, others):
                rows.append(row.to_json())
                console.print(f"{time.perf_counter() - began:6.0f} s  {row.name}: {row.ratio:.3g}")
                write_json(options.out, {"version": 1, "machine": machine(), "rows": rows})
    if not rows:
        console.print("nothing was measured: the part gpu needs a GPU, choose others with --only")
        return
    console.width = max(console.width, 140)
    console.print(table(rows))
    failed = [r["name"] for r in rows if r["holds"] is False]
    if failed:
        console.print(f"{len(failed)} of {len(rows)} rows miss their bar")
    sys.exit(0)


if __name__ == "__main__":
    main()
