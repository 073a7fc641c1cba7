"""One file, array or PIL image -> one checked image; `ImageError` says why another cannot serve."""

import hashlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from msvae.core.config import Resize
from msvae.core.errors import ImageError

Source = str | Path | Image.Image | NDArray[Any]
_FILTERS = threading.Lock()  # of warnings: they belong to the process, one thread at a time
SMALLEST = 8  # px
TURNED = range(2, 9)  # EXIF orientations that are not upright
GAP = 1.9  # Pillow's thumbnails keep 2; photographs of 500 px then miss a step by 12 px
BITS, PHOTOMETRIC, PLANAR = 258, 262, 284  # tags of TIFF
FRACTIONS = (8, 4, 2, 1)  # of its size, at which a JPEG is decoded
OTHER_ENDINGS = frozenset(  # drawings and films that want other programs, and data
    [
        ".eps",
        ".ps",
        ".mpg",
        ".mpeg",
        ".h5",
        ".hdf",
        ".bufr",
        ".grib",
        ".wmf",
        ".emf",
        ".fli",
        ".flc",
    ]
)
PLAIN = ("YCbCr", "Gray")  # colours of a JPEG that need no second look
Pixels = NDArray[np.uint8]


@contextmanager
def quiet() -> Iterator[None]:
    """Within it no warning is shown; what else the filters should do may be added."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@lru_cache(maxsize=1)
def endings() -> frozenset[str]:
    """Of the files that Pillow opens by itself."""
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in Image.OPEN) - OTHER_ENDINGS


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file; hidden files are not."""
    return path.suffix.lower() in endings() and not path.name.startswith(".")


def name_of(source: Source, index: int) -> str:
    """The path of a file; "image 3" for what is in memory."""
    return str(source) if isinstance(source, str | Path) else f"image {index}"


def digest(source: Source) -> str:
    """sha256 of the file's bytes, or of an array's type, shape and values."""
    if isinstance(source, str | Path):
        return hashlib.sha256(read_bytes(source)).hexdigest()
    array = np.ascontiguousarray(source)
    mode = source.mode if isinstance(source, Image.Image) else ""
    head = f"{mode}{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file that is there and not empty."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(str(path), f"cannot be read ({error.strerror})") from error
    if not data:
        raise ImageError(str(path), "is empty (0 bytes)")
    return data


def open_image(
    source: Source, name: str | None = None, data: bytes | None = None, least: int = 0
) -> Image.Image:
    """The image as RGB: turned by EXIF, alpha laid on white, 16 bits scaled to 8.

    `data` are the file's bytes where the caller has read them. With `least` a JPEG is decoded at a
    half, a quarter or an eighth of its size where both sides keep at least so many px. Raises
    `ImageError`.
    """
    name = name or name_of(source, 0)
    if isinstance(source, str | Path):
        image = decoded(data or read_bytes(source), name, least)
    elif isinstance(source, Image.Image):
        image = _loaded(source, name)
    else:
        image = _from_array(np.asarray(source), name)
    if min(image.size) < SMALLEST:
        raise ImageError(name, f"is {image.size[0]}×{image.size[1]} px: at least {SMALLEST} needed")
    try:
        return _as_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # a palette's transparency of another length, for one
        raise ImageError(name, f"is damaged: {_first_line(error)}") from error


def load_image(
    source: Source,
    size: int,
    resize: Resize = "stretch",
    *,
    name: str | None = None,
    data: bytes | None = None,
) -> Pixels:
    """The image at `size` x `size` px, (S, S, 3), Pillow BICUBIC with antialiasing.

    `stretch` brings the whole image to the square, `square` its centre square. A large JPEG is
    decoded at a fraction of its size first, `GAP` times `size` at least: on a photograph of
    500 x 667 px that takes a quarter of the time for 64 px and half of it for 128, and moves a
    value by 1.2 and 1.0 of 255 on average.
    """
    image = squared(open_image(source, name, data, round(GAP * size)), resize)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image file, px, as it is shown (turned by EXIF)."""
    return decoded(read_bytes(path), str(path)).size


def squared(image: Image.Image, resize: Resize) -> Image.Image:
    """The centre square for `square`, the image itself for `stretch`."""
    if resize == "stretch":
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def decoded(data: bytes, name: str, least: int = 0) -> Image.Image:
    """The image of a file's bytes in its own mode, turned by EXIF; `least` as for `open_image`."""
    quick = _quickly(data, least)
    if quick is not None:
        return quick
    try:
        with quiet():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))  # the header only
            if least:
                image.draft(None, (least, least))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ImageError(name, f"has more than {limit} megapixels (decompression bomb?)") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, "is not an image that Pillow can open") from error
    except Exception as error:  # Pillow's parsers raise anything from OSError to struct.error
        raise ImageError(name, f"is damaged: {_first_line(error)}") from error
    _check_pages(image, name)
    return _inverted(_loaded(image, name), image)


def _check_pages(image: Image.Image, name: str) -> None:
    """Raise `ImageError` where a file holds more, or other, than the one picture that is read."""
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a phone's preview
    if pages > 1:
        raise ImageError(name, f"holds {pages} pages or frames: save each as a file of its own")
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANAR) == 2 and max(tags.get(BITS, (8,))) > 8:
        raise ImageError(name, "is a TIFF of 16 bits in planes: save it with interleaved channels")


def _inverted(loaded: Image.Image, image: Image.Image) -> Image.Image:
    """Grey of 16 bits whose 0 is white, turned over; Pillow does it for 8 bits only."""
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0 and loaded.mode.startswith("I;16"):
        return Image.fromarray(65535 - np.asarray(loaded).astype(np.uint16))
    return loaded


@lru_cache(maxsize=1)
def _simplejpeg() -> Any:
    """The library, where it is installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _quickly(data: bytes, least: int) -> Image.Image | None:
    """A plain JPEG by simplejpeg: the pixels that Pillow gives, in 0.15 ms less.

    None without the library, and wherever Pillow has to look: what EXIF may turn, other colours, sizes
    that it warns of, damage.
    """
    library = _simplejpeg()
    if library is None or not data.startswith(b"\xff\xd8") or b"Exif\0" in data:
        return None
    try:
        high, wide, colours, _ = library.decode_jpeg_header(data)
        if colours not in PLAIN or high * wide > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        fits = min(high // least, wide // least) if least else 1
        share = next((s for s in FRACTIONS if s <= fits), 1)
        size = -(-high // share), -(-wide // share)
        pixels = library.decode_jpeg(
            data, "RGB", min_height=size[0], min_width=size[1], min_factor=1, strict=True
        )
    except Exception:  # it knows fewer kinds than Pillow, and raises anything for the others
        return None
    return Image.fromarray(pixels) if pixels.shape[:2] == size else None


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Decoded and turned as its EXIF says; EXIF that makes no sense is no reason to refuse."""
    try:
        image.load()
    except Exception as error:  # as above
        raise ImageError(name, f"is damaged: {_first_line(error)}") from error
    try:  # an image that needs no turning would be copied
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:
        return image


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image, name)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits or float to 8 bits by the range of its type, never by its own range."""
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(_from_float(values, name))
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(name, f"has values {values.min()}…{values.max()}: 16 bits hold 0…65535")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _from_array(array: NDArray[Any], name: str) -> Image.Image:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if not grey and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(name, f"has shape {array.shape}: (H, W), (H, W, 3) or (H, W, 4) is needed")
    if array.size == 0:
        raise ImageError(name, "has no pixels")
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        array = _from_float(array, name)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(
            name, f"has type {array.dtype}: uint8, uint16 or float in [0, 1] is needed"
        )
    return Image.fromarray(
        np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and grey else array)
    )


def _from_float(array: NDArray[Any], name: str) -> Pixels:
    if not np.isfinite(array).all():
        raise ImageError(name, "has values that are not finite (NaN or infinity)")
    if array.min() < -1e-6 or array.max() > 1 + 1e-6:
        raise ImageError(name, f"has values {array.min():g}…{array.max():g}: floats lie in [0, 1]")
    scaled: Pixels = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return scaled
