"""Pictures and numbers that a run writes beside its table: maps and explanations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msvae.core import files
from msvae.core.errors import DataError, ImageError
from msvae.core.progress import NullProgress, Progress
from msvae.core.replacement import check_folder, is_stream, replacing
from msvae.data.folder import find_images
from msvae.data.images import (
    open_image,
    squared,
)
from msvae.evaluation.table import quarantine_table
from msvae.explain import explanation
from msvae.run.detector import Detector, load
from msvae.run.score import EachMap, Maps, Scan
from msvae.run.store import QUARANTINE
from msvae.scores.catalog import UNITS
from msvae.viz import curves as figures
from msvae.viz import overlays as pictures

MAP_SIDE = 512  # px of a map's picture at most


def write_scores(out: Path, scan: Scan, *, bom: bool = False) -> Path | None:
    """Write the table of a scan, and the reasons of the others beside it, in one step.

    `bom` begins the table with a byte-order mark, as Excel wants it.

    Returns the path of the latter, F.quarantine.csv; None where all could be used.
    """
    quarantine = out.with_name(f"{out.stem}.quarantine.csv")
    if is_stream(out):  # nothing goes beside a device
        scan.table.write_csv(out, bom=bom)
        return None
    with replacing(out.parent) as new:
        with new.open(out.name) as file:
            file.writelines(files.csv_lines(scan.table.lines(), bom=bom))
        if scan.quarantine:
            new.write(quarantine.name, files.as_csv(quarantine_table(scan.quarantine)))
        else:
            new.remove(quarantine.name)  # an earlier command's
    return quarantine if scan.quarantine else None


def map_writer(out: Path, paths: Sequence[str], detector: Detector) -> EachMap:
    """Writes the fused map of each image it is given: `<stem>.png` to look at, `<stem>.tiff` floats.

    The picture is at most 512 px a side, its colours those of every image of the run, shown below it;
    the TIFF holds the values at the model's resolution.
    """
    stems = files.unique_stems(paths)
    c = detector.config.model
    scale = detector.calibration.map_scale("fused")

    def write(name: str, maps: Maps) -> None:
        fused = maps["fused"]
        whole = squared(open_image(name), c.resize)
        image = pictures.shrink(np.asarray(whole), MAP_SIDE)
        drawn = pictures.overlay(image, fused, *scale)
        drawn = pictures.with_bar(drawn, *scale, UNITS["fused"])
        files.write_bytes(out / f"{stems[name]}.png", pictures.as_bytes(drawn, "PNG"))
        files.write_bytes(out / f"{stems[name]}.tiff", pictures.as_bytes(fused, "TIFF"))

    return write


def explain(
    run: str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    progress: Progress | None = None,
) -> list[Path]:
    """Why each image is flagged or not: `<stem>.png` and `<stem>.json` in `out`; returns the pictures.

    `images` are files, folders or globs. A hash of the path is in the stem where stems collide.
    Images that cannot be read are named in `out`/quarantine.csv; `DataError` where none can.
    """
    return write_explanations(load(run), find_images(images, pngs=False).names, Path(out), progress)


def write_explanations(
    detector: Detector, paths: Sequence[str], out: Path, progress: Progress | None = None
) -> list[Path]:
    """The pictures and numbers of `explain`, by a detector that is loaded."""
    check_folder(out)
    stems = files.unique_stems(paths)
    written, refused = list[Path](), list[ImageError]()
    for path in (progress or NullProgress()).track(paths, "explaining", len(paths)):
        try:
            explained = detector.explain(path)
        except ImageError as error:
            refused.append(error)
            continue
        target = out / f"{stems[path]}.png"
        files.write_bytes(target, figures.as_bytes(explanation.figure(explained), "png"))
        files.write_json(target.with_suffix(".json"), explained.to_json())
        written.append(target)
    if not written:
        raise DataError(f"none of {len(paths)} images could be read, first {refused[0]}")
    with replacing(out) as new:
        if refused:
            new.write(QUARANTINE, files.as_csv(quarantine_table(refused)))
        else:
            new.remove(QUARANTINE)  # an earlier command's
    return written
