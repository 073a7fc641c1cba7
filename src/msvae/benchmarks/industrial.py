"""MVTec AD and Magnetic Tile Defects: fit on good parts, judged on defects and their masks."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msvae import __version__
from msvae.core import files
from msvae.core.config import Config
from msvae.core.errors import DataError, MsvaeError
from msvae.core.progress import Progress
from msvae.data import datasets
from msvae.data.folder import Sample, find_labelled
from msvae.data.split import number_gap_groups, text_sha256
from msvae.run.detector import Detector
from msvae.run.evaluate import Evaluated, evaluate_samples, history_of
from msvae.run.fit import check_free, fit

TEST_GROUPS = 0.2  # of the magnetic tiles' groups
DEFECT_SIDE = 128  # px of the industrial benchmarks, unless said


def mvtec(
    data_dir: Path,
    category: str,
    out: Path,
    config: Config,
    *,
    overwrite: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One MVTec AD category: fit on train/good, judge on test; `out` becomes a loadable run."""
    root = datasets.mvtec(data_dir, category)
    began = time.perf_counter()
    detector = fit(
        root, out, config=config, overwrite=overwrite, progress=progress, say=say
    )  # train/good only
    seconds = {"fit": time.perf_counter() - began}
    return _judged(f"mvtec-{category}", detector, find_labelled(root), out, seconds, progress)


def mvtec_all(
    data_dir: Path,
    out: Path,
    config: Config,
    *,
    overwrite: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every category found below `data_dir`, each a run of its own in `out`, and their mean.

    A category that fails is a line with its reason, and the mean says how many it is of.
    """
    categories, result = dict[str, Any](), dict[str, Any]()
    names = list(datasets.mvtec_categories(data_dir))
    for name in names:
        check_free(out / name, resume=False, overwrite=overwrite)
    for name in names:
        say(f"category {name}, {len(categories) + 1} of {len(names)}")
        try:
            categories[name] = mvtec(
                data_dir,
                name,
                out / name,
                config,
                overwrite=overwrite,
                progress=progress,
                say=say,
            )
        except MsvaeError as error:
            say(f"category {name} failed: {error}")
            categories[name] = {"failed": str(error)}
        result |= {
            "benchmark": "mvtec",
            "version": 1,
            "msvae": __version__,
            "seed": config.train.seed,
            "categories": categories,
            "mean": mean_over(categories),
        }
        files.write_json(out / "metrics.json", result)
    if not result["mean"]["of"]:
        raise DataError(
            f"every category failed, first {names[0]}: {categories[names[0]]['failed']}"
        )
    return result


def mean_over(categories: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The unweighted means of the fused score's and the fused map's figures over the categories.

    With how many they are of, and how many there were.
    """
    done = [block for block in categories.values() if "scores" in block]
    image = ("auroc", "average_precision")
    out: dict[str, Any] = {"of": len(done), "categories": len(categories)}
    out["scores"] = {"fused": _means([block["scores"]["fused"] for block in done], image)}
    maps = [block["maps"]["fused"] for block in done if "maps" in block]
    out["maps"] = {"fused": _means(maps, ("auroc", "average_precision", "f1_max", "aupro"))}
    return out


def _means(blocks: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {k: sum(b[k] for b in blocks) / len(blocks) for k in names} if blocks else {}


def magnetic_tile(
    data_dir: Path,
    out: Path,
    config: Config,
    *,
    overwrite: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Magnetic Tile Defects, split by groups of neighbouring numbers; `out` becomes a run."""
    tiles = datasets.magnetic_tile(data_dir)
    names = [str(p) for p in tiles.normal]
    groups = number_gap_groups(names)
    held = set(groups_for_test(groups))
    train = [p for p, group in zip(tiles.normal, groups, strict=True) if group not in held]
    normal = [p for p, group in zip(tiles.normal, groups, strict=True) if group in held]
    say(f"{len(set(groups))} groups of neighbouring tiles, {len(held)} of them for the test")
    began = time.perf_counter()
    detector = fit(
        train,
        out,
        config=config,
        group_by=number_gap_groups,
        overwrite=overwrite,
        progress=progress,
        say=say,
    )
    seconds = {"fit": time.perf_counter() - began}
    samples = [*[Sample(p, 0, "good") for p in normal], *tiles.anomalous]
    return _judged("magnetic-tile", detector, samples, out, seconds, progress)


def groups_for_test(groups: Sequence[str]) -> list[str]:
    """The first fifth of the groups, by the sha256 of their names."""
    ordered = sorted(set(groups), key=text_sha256)
    return ordered[: -(-len(ordered) // round(1 / TEST_GROUPS))]


def _judged(
    name: str,
    detector: Detector,
    samples: Sequence[Sample],
    out: Path,
    seconds: dict[str, float],
    progress: Progress,
) -> dict[str, Any]:
    judged: Evaluated = evaluate_samples(
        detector,
        samples,
        out / "evaluation",
        name=name,
        seconds=seconds,
        progress=progress,
        history=history_of(out),
    )
    result = judged.evaluation.to_json()
    files.write_json(out / "metrics.json", {"benchmark": name, "msvae": __version__, **result})
    return result
