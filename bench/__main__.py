"""`python -m bench`: every row, a table on the screen, and results.json."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from bench import gpu, memory, peers, results, scoring, training
from bench.material import Material, prepare
from bench.rows import Row

OUT = Path("bench/results.json")
Part = Callable[[Material, peers.Peers], Iterator[Row]]
PARTS: dict[str, Part] = {
    "training": training.rows,
    "scoring": scoring.rows,
    "gpu": gpu.rows,
    "memory": lambda material, _: memory.rows(material),
}


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("MSVAE_DATA"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, help="keep images, runs and peers here")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--no-peers", action="store_true", help="leave the other programs out")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options, console, began = parse(), Console(stderr=True), time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        data = None if options.data_dir is None else Path(options.data_dir).resolve()
        material = prepare(work, data)
        others = {} if options.no_peers else peers.install(work / "peers", console.print)
        for part in options.only:
            for row in PARTS[part](material, others):
                rows.append(row)
                passed = f"{time.perf_counter() - began:6.0f} s"
                text = f"{passed}  {row.name}: {results.number(row.ratio, 3)}"
                console.print(text, soft_wrap=True)
                results.write(options.out, rows)
    if rows:
        results.show(rows, console)
    else:
        console.print("nothing was measured: the part gpu needs a GPU, choose others with --only")


if __name__ == "__main__":
    main()
