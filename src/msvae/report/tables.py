"""The tables of a report: what each map, each part and each explanation is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of figures; a row is its name and its cells, None where there is no figure."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[float | str | None]]
    about: str = ""
    highlight: str = "fused"
    notes: tuple[str, ...] = ()


MAP_COLUMNS = {
    "auroc": "Pixel AUROC",
    "average_precision": "Pixel AP",
    "f1_max": "F1-max (oracle)",
    "aupro": "AUPRO@0.3",
}
EXPLANATION_COLUMNS = {
    "pointing_game": "Peak in defect",
    "deletion_fused_win_rate": "Fused: further",
    "deletion_fused_median": "by (nats)",
    "deletion_fused_median_moved": "moved: by (nats)",
    "deletion_spatial_win_rate": "Spatial: further",
    "deletion_spatial_median": "by (sd)",
    "deletion_spatial_median_moved": "moved: by (sd)",
    "weight_randomisation": "Random weights",
}
EXPLANATIONS_ABOUT = (
    "Deletion: the tenth of the pixels where a map is highest is replaced by the reconstruction. "
    "How often that makes a score fall further than the same pixels moved to a random place do, "
    "and by how much (median), here and there. Random weights: the rank correlation with "
    "the map of a network that learned nothing, near 0 where a map shows what was learned; "
    "structure reads the picture alone, so its is 1. Where the VAE rebuilds textures too "
    "smoothly, the replaced patch is itself unusual and the fused score rises."
)
MAPS_ABOUT = (
    "How well each map points at the true defects, pixel by pixel: 1 is perfect, and an AUROC of "
    "0.5 is guessing. AUPRO counts small defects as much as large ones. F1-max takes its "
    "threshold from these very images, so nothing in use can exceed it."
)


def maps_table(maps: Mapping[str, Mapping[str, float]], **more: Any) -> Table:
    """The `maps` block of a metrics.json as a table; keys it does not know become columns too."""
    present = dict.fromkeys(key for figures in maps.values() for key in figures)
    keys = [k for k in MAP_COLUMNS if k in present] + [k for k in present if k not in MAP_COLUMNS]
    columns = tuple(MAP_COLUMNS.get(k, k.replace("_", " ").capitalize()) for k in keys)
    rows = {name: tuple(figures.get(k) for k in keys) for name, figures in maps.items()}
    words = {"title": "Where in the picture", "about": MAPS_ABOUT}
    return Table(**{**words, "columns": columns, "rows": rows, **more})


ABLATION_ABOUT = (
    "The frozen fusion with one score silenced, and the same scores joined otherwise. The intervals "
    "are 95 % bootstrap intervals, of the AUROC and of the fused score's minus it."
)


def ablation_table(variants: Mapping[str, Mapping[str, Any]], **more: Any) -> Table:
    """The `ablation` block of a metrics.json as a table."""

    def cells(block: Mapping[str, Any]) -> tuple[float | str | None, ...]:
        area, gain = block["auroc_ci95"], block["fused_minus_ci95"]
        return (
            block["auroc"],
            f"{area[0]:.3f} to {area[1]:.3f}",
            f"{gain[0]:+.3f} to {gain[1]:+.3f}",
        )

    columns = ("AUROC", "95 % interval", "fused minus this")
    rows = {name: cells(block) for name, block in variants.items()}
    words = {"title": "What each part is worth", "about": ABLATION_ABOUT}
    return Table(**{**words, "columns": columns, "rows": rows, **more})


def explanations_table(kinds: Mapping[str, Mapping[str, float]], **more: Any) -> Table:
    """The `explanations` block of a metrics.json as a table."""
    keys = [k for k in EXPLANATION_COLUMNS if any(k in figures for figures in kinds.values())]
    columns = tuple(EXPLANATION_COLUMNS[k] for k in keys)
    rows = {name: tuple(figures.get(k) for k in keys) for name, figures in kinds.items()}
    count = max((int(figures.get("images", 0)) for figures in kinds.values()), default=0)
    words = {
        "title": "Do the maps explain?",
        "about": f"On {count} anomalous images. {EXPLANATIONS_ABOUT}",
    }
    return Table(**{**words, "columns": columns, "rows": rows, **more})
