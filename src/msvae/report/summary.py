"""What was decided, in sentences and figures: what a report begins with."""

from dataclasses import dataclass
from typing import Any

from msvae.viz.text import Interval, percent, plural

TAUGHT = {"fused_feedback": "fused, taught by labelled anomalies: mean of five draws"}  # benchmark
GALLERIES = {
    "anomalous": ("Most anomalous", "The highest fused scores, highest first."),
    "borderline": ("Borderline", "Those nearest to where flagging begins, on either side."),
    "false_alarms": ("False alarms", "Normal images that were flagged, highest score first."),
    "misses": ("Misses", "Anomalous images that passed, lowest score first."),
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was decided: counts, the rate asked for, and what was to be expected of it."""

    images: int
    flagged: int
    target_fpr: float
    name: str = ""  # "equalised", where there are several
    n_conformal: int | None = None
    normals: int | None = None  # the next four where labels exist
    false_alarms: int | None = None
    anomalies: int | None = None
    found: int | None = None
    expected95: Interval | None = None  # central 95 % of the realised false-alarm rate
    unreadable: int = 0
    figures: tuple[tuple[str, str, str], ...] = ()  # further tiles: label, value, detail


def sentence(s: Summary) -> str:
    """The decision in plain language."""
    if s.images == 0:
        return "Nothing has been scored yet: this page shows what the training left behind."
    if s.normals is not None and s.anomalies is not None:
        alarms = f"{s.false_alarms or 0:,} of {plural(s.normals, 'normal image', 'normal images')}"
        if not s.anomalies:
            return f"{alarms} flagged by mistake."
        found = plural(s.anomalies, "anomalous image", "anomalous images")
        return f"{s.found or 0:,} of {found} found; {alarms} flagged by mistake."
    verb = "is" if s.flagged == 1 else "are"
    return f"{s.flagged:,} of {plural(s.images, 'image', 'images')} {verb} flagged as unusual."


def promise(s: Summary) -> str:
    """What the false-alarm rate asked for says about this set."""
    asked = f"Asked for: at most {percent(s.target_fpr)} false alarms"
    asked += f", set on {s.n_conformal:,} normal images kept aside." if s.n_conformal else "."
    if s.expected95 is None or s.images == 0:
        return asked
    low, high = s.expected95
    between = f"between {percent(low)} and {percent(high)}"
    if not s.normals:
        return f"{asked} Were all of these images normal, {between} would be flagged by chance."
    rate = (s.false_alarms or 0) / s.normals
    verdict = "fewer than expected" if rate < low else "as expected"
    verdict = "more than expected" if rate > high else verdict
    return f"{asked} Realised: {percent(rate)}, {verdict} (95 % of such sets lie {between})."


def tiles(s: Summary) -> list[tuple[str, str, str]]:
    """Label, value and detail of the figures beside the sentence."""
    out = [("Images", f"{s.images:,}", f"{s.unreadable:,} unreadable" if s.unreadable else "")]
    if s.images:
        out.append(("Flagged", f"{s.flagged:,}", percent(s.flagged / s.images)))
    if s.anomalies:
        found = s.found or 0
        out.append(
            ("Anomalies found", percent(found / s.anomalies), f"{found:,} / {s.anomalies:,}")
        )
    if s.normals:
        wrong = s.false_alarms or 0
        detail = f"{wrong:,} / {s.normals:,}, asked {percent(s.target_fpr)}"
        out.append(("False alarms", percent(wrong / s.normals), detail))
    return [*out, *s.figures]


def one_sided_note(block: dict[str, Any]) -> str:
    """What became of the seed's own weighted score, in a sentence."""
    area = block["scores"]["weighted"]["auroc"]
    if area >= 0.5:
        return f"The seed's weighted score, one-sided as it is defined, reaches {area:.3f} here."
    return (
        f"The seed's weighted score reaches {area:.3f}, worse than guessing: these anomalies are "
        "smoother than flowers, so they are rebuilt with less error than normal images, and a "
        "one-sided error calls them more normal still. Read two-sidedly, the same numbers tell "
        f"them apart (typicality {block['scores']['typicality']['auroc']:.3f})."
    )
