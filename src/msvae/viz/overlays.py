"""Pictures for a page: maps coloured and laid over the image, bounded data URIs, themed SVG."""

import base64
import colorsys
import re
from functools import lru_cache
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import DataError

Pixels = NDArray[np.uint8]  # (H, W, 3)
Map = NDArray[np.float32]  # (H, W)
SEQUENTIAL, DIVERGING = "inferno", "RdBu_r"
LOSSLESS_SIDE = 64
BAR_WIDTH, BAR_HEIGHT = 128, 30  # px of a bar of colours with its words, at least
SVG_NS = "http://www.w3.org/2000/svg"
KEPT_ELEMENTS = frozenset(
    "svg g defs path use rect line polyline polygon circle ellipse text tspan clipPath "  # noqa: SIM905
    "linearGradient radialGradient stop title desc image".split()
)


@lru_cache
def _palette(name: str) -> Pixels:
    """The 256 colours of a matplotlib colour map, (256, 3)."""
    from matplotlib import colormaps

    colours: Pixels = (
        (colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    )
    return colours


def palette_name(signed: bool) -> str:
    """The colour map of matplotlib that maps are drawn in."""
    return DIVERGING if signed else SEQUENTIAL


def gradient(signed: bool, steps: int = 9) -> str:
    """The colour scale as a CSS gradient, low to high."""
    colours = _palette(palette_name(signed))[np.linspace(0, 255, steps).astype(int)]
    stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours)
    return f"linear-gradient(to right, {stops})"


def strength(values: Map, low: float, high: float) -> NDArray[np.float64]:
    """Values to [0, 1] between `low` and `high`; what is not a number counts as `low`."""
    clean = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.clip((clean - low) / max(high - low, 1e-12), 0, 1)


def colour(values: Map, low: float, high: float, signed: bool = False) -> Pixels:
    """A map in colours, (H, W, 3); a signed one diverges about the middle of `low`…`high`."""
    index = (strength(values, low, high) * 255).round().astype(int)
    painted: Pixels = _palette(palette_name(signed))[index]
    return painted


def overlay(image: Pixels, values: Map, low: float, high: float, signed: bool = False) -> Pixels:
    """The map over the greyed image: the further from ordinary, the more opaque the colour."""
    values = fit_map(values, image.shape[0], image.shape[1])
    share = strength(values, low, high)
    opacity = 0.85 * (np.abs(2 * share - 1) if signed else share) ** 0.7
    grey = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    grey = np.repeat(40 + 0.75 * grey[..., None], 3, axis=2)
    mixed = grey + opacity[..., None] * (colour(values, low, high, signed) - grey)
    drawn: Pixels = np.clip(mixed, 0, 255).round().astype(np.uint8)
    return drawn


def with_bar(image: Pixels, low: float, high: float, unit: str) -> Pixels:
    """The picture above a bar of the colours from `low` to `high`, with both values and the unit."""
    from PIL import Image, ImageDraw, ImageFont

    width, font = max(image.shape[1], BAR_WIDTH), ImageFont.load_default(11)
    page = Image.new("RGB", (width, image.shape[0] + BAR_HEIGHT), "white")
    page.paste(Image.fromarray(image), ((width - image.shape[1]) // 2, 0))
    ramp = np.linspace(low, high, width - 12, dtype=np.float32)
    page.paste(Image.fromarray(colour(np.tile(ramp, (8, 1)), low, high)), (6, image.shape[0] + 4))
    draw, top = ImageDraw.Draw(page), image.shape[0] + 14
    draw.text((6, top), f"{low:.3g}", "black", font)
    draw.text((width - 6, top), f"{high:.3g} {unit}", "black", font, anchor="ra")
    return np.asarray(page)


def outline(image: Pixels, inside: NDArray[np.bool_]) -> Pixels:
    """The image with a white line, dark-edged, round the region `inside`."""
    ring, outer = inside & ~_eroded(inside), _eroded(~inside)
    out = image.copy()
    out[~inside & ~outer] = (20, 20, 20)
    out[ring] = (255, 255, 255)
    return out


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1, mode="edge")
    rows, columns = mask.shape
    shifts = [(0, 1), (2, 1), (1, 0), (1, 2)]
    kept: NDArray[np.bool_] = np.logical_and.reduce(
        [padded[r : r + rows, c : c + columns] for r, c in shifts]
    )
    return kept


def fit_map(values: Map, rows: int, columns: int) -> Map:
    """The map at another size, bilinear; unchanged where it fits already."""
    if values.shape == (rows, columns):
        return values
    from PIL import Image

    resized = Image.fromarray(values.astype(np.float32)).resize(
        (columns, rows), Image.Resampling.BILINEAR
    )
    return np.asarray(resized, dtype=np.float32)


def fit_mask(mask: NDArray[np.bool_], rows: int, columns: int) -> NDArray[np.bool_]:
    """The mask at another size: true where more than half is covered, or the most covered place."""
    share = fit_map(mask.astype(np.float32), rows, columns)
    inside: NDArray[np.bool_] = share >= (min(0.5, float(share.max())) if mask.any() else 2)
    return inside


def shrink(image: Pixels, side: int) -> Pixels:
    """The image with its longer side at most `side`; never enlarged."""
    from PIL import Image

    rows, columns = image.shape[:2]
    if max(rows, columns) <= side:
        return image
    scale = side / max(rows, columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def as_bytes(pixels: Pixels | Map, kind: str) -> bytes:
    """An image, or a map of floats, as the bytes of a PNG or TIFF file."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def data_uri(image: Pixels, side: int, quality: int = 80) -> str:
    """A WebP of bounded size inside an address; tiny images lossless."""
    from PIL import Image

    small = shrink(image, side)
    lossless = max(small.shape[:2]) <= LOSSLESS_SIDE
    buffer = BytesIO()
    Image.fromarray(small).save(buffer, "WEBP", quality=quality, lossless=lossless, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def themed_svg(svg: str, prefix: str) -> tuple[str, set[str]]:
    """An SVG to set into the page, and the colours whose darker-page version the page must define.

    Greys become the page's text, line and paper colours, other colours a variable `--fig-rrggbb`;
    names are made unique by `prefix`; scripts and outside references are dropped.
    """
    ElementTree.register_namespace("", SVG_NS)
    if "<!ENTITY" in svg:
        raise DataError("a figure's SVG must not define entities: save it again with matplotlib")
    root = ElementTree.fromstring(svg)  # noqa: S314 (entities are refused above)
    _clean(root, prefix)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    colours: set[str] = set()
    text = ElementTree.tostring(root, encoding="unicode")
    themed = re.sub(r"#[0-9a-fA-F]{6}\b", lambda m: _variable(m.group(), colours), text)
    return themed, colours


def _clean(element: ElementTree.Element, prefix: str) -> None:
    for child in list(element):
        if not isinstance(child.tag, str) or child.tag.split("}")[-1] not in KEPT_ELEMENTS:
            element.remove(child)
        else:
            _clean(child, prefix)
    for key, value in list(element.attrib.items()):
        name = key.split("}")[-1]
        outside = name == "href" and not value.startswith(("#", "data:image/"))
        if name.startswith("on") or outside:
            del element.attrib[key]
        elif name == "id":
            element.attrib[key] = prefix + value
        elif name == "href" and value.startswith("#"):
            del element.attrib[key]
            element.attrib["href"] = f"#{prefix}{value[1:]}"
        elif name in ("fill", "stroke") and value.startswith("#"):  # var() needs a style
            del element.attrib[key]
            element.attrib["style"] = f"{name}: {value}; " + element.attrib.get("style", "")
        elif "url(#" in value:
            element.attrib[key] = value.replace("url(#", f"url(#{prefix}")


def _variable(colour_code: str, colours: set[str]) -> str:
    red, green, blue = (int(colour_code[k : k + 2], 16) for k in (1, 3, 5))
    if max(red, green, blue) - min(red, green, blue) <= 12:
        grey = (red + green + blue) / 3
        names = ((90, "--ink"), (160, "--muted"), (246, "--line"), (256, "--paper"))
        return next(f"var({name})" for top, name in names if grey < top)
    colours.add(colour_code.lower())
    return f"var(--fig-{colour_code[1:].lower()}, {colour_code})"


def for_dark(colour_code: str) -> str:
    """The same hue, light enough for lines on a dark page."""
    rgb = [int(colour_code[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    hue, light, saturation = colorsys.rgb_to_hls(rgb[0], rgb[1], rgb[2])
    red, green, blue = colorsys.hls_to_rgb(hue, max(light, 0.66), min(saturation, 0.85))
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
