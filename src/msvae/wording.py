"""Figures and decisions in plain words."""

import math
from dataclasses import dataclass

Interval = tuple[float, float]

NAME_LENGTH = 300

ABOUT = {
    "reconstruction": "squared error of the reconstruction (seed)",
    "mahalanobis": "distance of the latent mean (seed)",
    "weighted": "0.6 / 0.4 sum of both, min-max (seed)",
    "weighted_raw": "the same, as literally written (seed)",
    "kl": "rate: divergence from the prior",
    "elbo": "negative evidence lower bound",
    "spread": "width of the posterior",
    "spatial": "local feature distance, oddest places",
    "residual": "standardised error map, oddest places",
    "structure": "local structure distance, oddest places",
    "inspection": "marked defects, oddest places",
    "order": "which channel order is this?",
    "turn": "how many quarter turns is this?",
    "neighbours": "cosine distance to the nearest normals",
    "bands": "two-sided, error by frequency band",
    "complexity": "two-sided, the image by frequency band",
    "typicality": "two-sided density of all statistics",
    "fused": "all of them: the decision",
}

TAUGHT = {"fused_feedback": "fused, taught by labelled anomalies: mean of five draws"}  # benchmark

EXTREMES = {  # what a high score says of an image, and what a low one says
    "reconstruction": ("as badly rebuilt as the worst", "as well rebuilt as the best"),
    "mahalanobis": ("as far from the latent mean as the farthest", "as near it as the nearest"),
    "kl": ("as rich in the latents as the richest", "as empty in the latents as the emptiest"),
    "elbo": ("as unlikely as the least likely", "as likely as the likeliest"),
    "spread": ("as vague in the latents as the vaguest", "as definite as the most definite"),
    "spatial": ("with parts as odd as the oddest", "with parts as usual as the most usual"),
    "residual": (
        "as badly rebuilt for the place as the worst",
        "as well rebuilt for the place as the best",
    ),
    "structure": ("with structure as odd as the oddest", "as regular as the most regular"),
    "inspection": ("as marked as the most marked", "as clean as the cleanest"),
    "order": ("as hard to colour as the hardest", "as easy to colour as the easiest"),
    "turn": ("as hard to set upright as the hardest", "as easy to set upright as the easiest"),
    "neighbours": ("as unlike its neighbours as the loneliest", "as like them as the closest"),
    "bands": ("with errors as unusual as the oddest", "with errors as usual as the most usual"),
    "complexity": (
        "with detail as unusual as the oddest",
        "with detail as usual as the most usual",
    ),
    "typicality": ("as untypical as the least typical", "as typical as the most typical"),
    "fused": ("as surprising as the most surprising", "as ordinary as the most ordinary"),
    "detail": ("as busy as the busiest", "as blurred as the bluntest"),
}
OTHERWISE = ("as high as the highest", "as low as the lowest")

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


def clip(text: str, length: int = NAME_LENGTH) -> str:
    """A text with its middle left out where it is longer than the page can bear."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def tail(name: str) -> str:
    """The last two parts of a path."""
    return clip("/".join(name.replace("\\", "/").rstrip("/").split("/")[-2:]), 60)


def number(value: float | str | None, digits: int = 3) -> str:
    """A figure for a table: `digits` decimals, fewer where it is large, two digits where they show none.

    A dash for none.
    """
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 10.0**-digits <= abs(value) < 1e5:
        return f"{value:.2g}"
    rounded = f"{abs(value):.{digits}f}"  # before the digits are counted: 999.96 has four of them
    large = len(rounded.split(".")[0]) - 1
    return f"{value:,.{max(0, digits - large)}f}"


def percent(rate: float) -> str:
    """A rate as a percentage of two or three digits."""
    value = 100 * rate
    text = f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"
    if text == "100.0" and rate < 1:
        return "> 99.9 %"
    return (text.removesuffix(".0") if "e" not in text else f"{value:.5f}") + " %"


def plural(count: int, one: str, many: str) -> str:
    """The count with its noun."""
    return f"{count:,} {one if count == 1 else many}"


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


def reading(name: str, p_high: float, p_low: float, n_conformal: int | None = None) -> str:
    """What a score says of an image, by its two tails: "as blurred as the bluntest 0.4 % of …"."""
    high, low = EXTREMES.get(name, OTHERWISE)
    p = min(p_high, p_low)
    if 2 * p > 0.2:
        return f"ordinary: {percent(p_high)} of normal images reach it"
    beyond = n_conformal and p * (n_conformal + 1) < 1.5
    told = f"{high if p_high <= p_low else low} {percent(p)} of normal images"
    return f"{told}, or beyond: outside all {n_conformal:,} kept aside" if beyond else told


def in_words(p: float | None, n_conformal: int | None = None) -> str:
    """A p-value as a sentence a newcomer understands."""
    if p is None:
        return ""
    if n_conformal and p * (n_conformal + 1) < 1.5:
        return f"higher than all {n_conformal:,} normal images kept aside"
    if p > 0.2:
        return f"ordinary: {percent(p)} of normal images reach it"
    return f"only {percent(p)} of normal images reach it"
