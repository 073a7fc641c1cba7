"""The ablation of several benchmarks side by side, as a Markdown table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msvae.core import files


def ablation_markdown(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The AUROCs of every score, and of every variant, of several sets side by side.

    `sets` are blocks of `metrics.json` by the name of their column.
    """
    lines = []
    for title, key in (("Each score alone", "scores"), ("The fused score changed", "ablation")):
        blocks = {name: block[key] for name, block in sets.items() if key in block}
        rows = list(dict.fromkeys(row for block in blocks.values() for row in block))
        lines += [f"| {title} | " + " | ".join(blocks) + " |", "|---" * (len(blocks) + 1) + "|"]
        lines += [_markdown_row(row, [block.get(row) for block in blocks.values()]) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(name: str, figures: Sequence[Mapping[str, Any] | None]) -> str:
    cells = []
    for block in figures:
        if block is None:
            cells.append("–")
            continue
        low, high = block["auroc_ci95"]
        cells.append(f"{block['auroc']:.3f} ({low:.3f}–{high:.3f})")
    return f"| {name} | " + " | ".join(cells) + " |"


def write_ablation(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The ablation of several benchmarks' results side by side, as a Markdown table."""
    sets = dict[str, Any]()
    for result in results:
        if "categories" in result:
            done = result["categories"].values()
            sets |= {block["evaluation"]: block for block in done if "scores" in block}
        elif "protocols" in result:
            sets |= {f"flowers-cifar10 {k}": block for k, block in result["protocols"].items()}
        else:
            sets[result["evaluation"]] = result
    files.write_text(path, ablation_markdown(sets))
