"""Whether an image was seen before: what is tested, taught or calibrated on must be new."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from msvae.core.errors import DataError, ImageError
from msvae.data.folder import Sample
from msvae.data.images import digest
from msvae.run import schema
from msvae.run.examples import LabelledExamples
from msvae.run.store import CALIBRATED


def check_examples(shown: LabelledExamples, known: Sequence[tuple[str, str]]) -> None:
    """Raise `DataError` where an example has the content of an image, (sha256, name), of the run."""
    names = dict(known)
    for row in shown.rows():
        if row["sha256"] in names:
            raise DataError(
                f"{row['path']}: has the content of {names[row['sha256']]}: an image may teach or "
                "calibrate, not both: take it out of one side"
            )


def check_leakage(run: Path, samples: Sequence[Sample]) -> None:
    """Raise `DataError` when a test image has the content of one the run was fitted on."""
    rows = [*schema.table(run / "split.csv"), *schema.table(run / CALIBRATED)]
    known = digests_of([s.path for s in samples])
    check_disjoint([row["sha256"] for row in rows], list(known.values()), list(known))


def digests_of(paths: Sequence[Path]) -> dict[str, str]:
    """The sha256 of each file by its path; one that cannot be read is left to the scan to list."""
    found = {}
    for path in paths:
        with suppress(ImageError):
            found[str(path)] = digest(path)
    return found


def check_not_trained(run: Path, normals: Sequence[Path]) -> None:
    """Raise `DataError` when calibration would use images that the run was trained on."""
    rows = schema.table(run / "split.csv")
    trained = {row["sha256"]: row["path"] for row in rows if row["part"] != "conformal"}
    for path, content in digests_of(normals).items():
        if content in trained:
            raise DataError(
                f"{path}: has the content of {trained[content]}, which the run was trained on: "
                "calibrate with other images"
            )


def check_disjoint(
    fitted: Sequence[str],
    tested: Sequence[str],
    names: Sequence[str],
    fitted_names: Sequence[str] | None = None,
) -> None:
    """Raise `DataError` naming a test image whose content the model was fitted on.

    `names` are those of the tested images; with `fitted_names` the other copy is named too.
    """
    known = dict(zip(fitted, fitted_names or ["an image of the run"] * len(fitted), strict=True))
    copies = [(name, known[c]) for c, name in zip(tested, names, strict=True) if c in known]
    if copies:
        raise DataError(
            f"{copies[0][0]}: has the content of {copies[0][1]}, which was fitted on "
            f"({len(copies)} such test images): take them out of one side"
        )
