"""One file, array or PIL image becomes one checked image, or a plain reason."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from msvae.core.errors import ImageError
from msvae.data import images
from msvae.data.images import digest, load_image, name_of, open_image
from msvae.data.masks import load_mask
from msvae.run.detector import _is_one


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def huge_png(path: Path, width: int, height: int) -> Path:
    """A few bytes that claim to be a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + sum_

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_file_array_and_pil_agree(tmp_path):
    """The same pixels give the same image, however they are handed in."""
    pixels = picture()
    path = save(tmp_path / "a.png", pixels)
    expected = load_image(path, 16)
    assert expected.shape == (16, 16, 3)
    assert expected.dtype == np.uint8
    for source in (str(path), pixels, Image.fromarray(pixels), pixels / 255.0):
        np.testing.assert_array_equal(load_image(source, 16), expected)


def test_resizing_is_pillows(tmp_path):
    """Stretch is the whole image, square its centre, both bicubic and antialiased."""
    image = Image.fromarray(picture(20, 30))
    by = Image.Resampling.BICUBIC
    np.testing.assert_array_equal(load_image(image, 12), np.asarray(image.resize((12, 12), by)))
    centre = image.crop((5, 0, 25, 20)).resize((12, 12), by)
    np.testing.assert_array_equal(load_image(image, 12, "square"), np.asarray(centre))


@pytest.mark.parametrize("in_memory", [False, True])
def test_exif_turns_the_image(tmp_path, in_memory):
    """A photo taken upright stands upright, as a file and as an open PIL image."""
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    path = save(tmp_path / "a.png", picture(20, 30), exif=exif)
    opened = open_image(Image.open(path) if in_memory else path)
    assert opened.size == (20, 30)
    np.testing.assert_array_equal(np.asarray(opened), np.rot90(picture(20, 30), -1))


def test_alpha_lies_on_white(tmp_path):
    """What is transparent is white, what is opaque keeps its colour."""
    rgba = np.zeros((10, 10, 4), dtype=np.uint8)
    rgba[:5, :, :] = (200, 10, 30, 255)
    expected = np.full((10, 10, 3), 255)
    expected[:5] = (200, 10, 30)
    np.testing.assert_array_equal(open_image(save(tmp_path / "a.png", rgba)), expected)
    np.testing.assert_array_equal(open_image(rgba), expected)


def test_sixteen_bits_scale_by_the_type(tmp_path):
    """16-bit grey is divided by 257, whatever its own range; so is an array."""
    deep = (np.arange(100, dtype=np.uint16) * 300).reshape(10, 10)
    expected = np.repeat((deep / 257).round()[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(open_image(deep), expected)
    np.testing.assert_array_equal(open_image(save(tmp_path / "a.png", deep)), expected)
    np.testing.assert_array_equal(open_image(save(tmp_path / "a.tif", deep)), expected)


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "LA", "YCbCr", "PA", "La", "RGBa", "HSV"])
def test_every_mode_becomes_rgb(mode):
    """Palettes, print colours and grey come out as RGB."""
    source = Image.fromarray(picture())
    step = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode)
    image = (source.convert(step) if step else source).convert(mode)
    assert open_image(image).mode == "RGB"


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (9, 9, 3), (9, 9, 4)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32, np.float64, np.bool_])
def test_arrays_that_serve(shape, kind):
    """Grey, RGB and RGBA arrays of the usual types are images."""
    assert open_image(np.ones(shape, dtype=kind)).mode == "RGB"


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((3, 9, 9), np.uint8), "shape"),
        (np.zeros((9, 9, 2), np.uint8), "shape"),
        (np.zeros((1, 9, 9, 3), np.uint8), "shape"),
        (np.zeros(9, np.uint8), "shape"),
        (np.zeros((0, 9), np.uint8), "no pixels"),
        (np.zeros((9, 9), np.int64), "type int64"),
        (np.full((9, 9), np.nan), "NaN"),
        (np.full((9, 9), np.inf), "NaN or infinity"),
        (np.full((9, 9), 1.5), r"lie in \[0, 1\]"),
        (np.full((9, 9), -0.5), r"lie in \[0, 1\]"),
        (np.zeros((7, 9), np.uint8), "9×7 px: at least 8"),
    ],
)
def test_arrays_that_do_not_serve(array, reason):
    """A wrong shape, type or range is named."""
    with pytest.raises(ImageError, match=reason):
        load_image(array, 8, name="image 3")


def bad_file(folder: Path, kind: str) -> Path:
    path = folder / "a.png"
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        whole = save(folder / "a.jpg", picture(64, 64)).read_bytes()
        path = folder / "b.jpg"
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "small":
        save(path, picture(7, 30))
    elif kind == "float":
        path = save(folder / "a.tif", np.full((9, 9), np.nan, np.float32))
    return path


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("absent", "cannot be read"),
        ("folder", "cannot be read"),
        ("empty", "0 bytes"),
        ("text", "not an image"),
        ("truncated", "damaged"),
        ("small", "at least 8"),
        ("float", "NaN"),
    ],
)
def test_files_that_do_not_serve(tmp_path, kind, reason):
    """An unusable file gives its name and one line that says why."""
    path = bad_file(tmp_path, kind)
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(path, 8)
    assert caught.value.name == str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [60_000, 10_000])  # beyond Pillow's error and its warning
@pytest.mark.parametrize("filters", ["error", "ignore"])
def test_a_decompression_bomb_is_refused(tmp_path, side, filters):
    """A tiny file that claims to be huge is refused, whatever the warning filters are."""
    path = huge_png(tmp_path / "a.png", side, side)
    assert path.stat().st_size < 200
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        with pytest.raises(ImageError, match="bomb"):
            load_image(path, 8)


def test_threads_leave_the_warning_filters_alone(tmp_path):
    """Decoding in threads does not change how the program's warnings are treated."""
    path = save(tmp_path / "a.png", picture())
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: load_image(path, 8), range(400)))
    assert list(warnings.filters) == before


def area_coverage(mask: np.ndarray, size: int) -> np.ndarray:
    """The slow way: repeat every pixel until the blocks fall on whole pixels."""
    height, width = mask.shape
    fine = mask.repeat(size, axis=0).repeat(size, axis=1).astype(float)
    return fine.reshape(size, height, size, width).mean(axis=(1, 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 23), st.integers(8, 23), st.integers(3, 25), st.integers(0, 99))
def test_masks_shrink_by_area(tmp_path_factory, height, width, size, seed):
    """A mask pixel is true where at least half of its block is, also at uneven ratios."""
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    path = save(tmp_path_factory.mktemp("m") / "m.png", (mask * 255).astype(np.uint8))
    cover = area_coverage(mask, size)
    sure = np.abs(cover - 0.5) > 1e-9
    np.testing.assert_array_equal(load_mask(path, size)[sure], (cover >= 0.5)[sure])
    assert load_mask(path, size)[~sure].all()


def test_a_mask_does_not_vanish(tmp_path):
    """A defect smaller than half a pixel keeps the pixel that it covers most; none stays none."""
    mask = np.zeros((64, 64), np.uint8)
    mask[9, 8:11] = 255
    mask[9, 7] = 255  # one pixel in the block to the left, three in this
    small = load_mask(save(tmp_path / "a.png", mask), 8)
    assert small.sum() == 1
    assert small[1, 1]
    assert not load_mask(save(tmp_path / "b.png", np.zeros((64, 64), np.uint8)), 8).any()


def test_masks_of_class_numbers_and_of_palettes_count(tmp_path):
    """A mask that holds 0 and 1, or is stored as 16 bits, is not taken for empty."""
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 1
    assert load_mask(save(tmp_path / "a.png", mask), 16).sum() == 128
    deep = mask.astype(np.uint16) * 65535
    assert load_mask(save(tmp_path / "b.png", deep), 16).sum() == 128


def test_digest_tells_contents_apart(tmp_path):
    """Copies have one digest; another type, shape, mode or value has another."""
    path, copy = save(tmp_path / "a.png", picture()), tmp_path / "b.png"
    copy.write_bytes(path.read_bytes())
    assert digest(path) == digest(str(copy))
    zeros = np.zeros((8, 9), np.uint8)
    others = [zeros, zeros.T, zeros.astype(bool), zeros + 1, Image.fromarray(zeros)]
    assert len({digest(o) for o in others}) == len(others)
    assert digest(zeros[:, ::2]) == digest(zeros[:, ::2].copy())


def test_names():
    """A file is called by its path, what is in memory by its place."""
    assert name_of(Path("a/b.png"), 3) == str(Path("a/b.png"))
    assert name_of(np.zeros((8, 8)), 3) == "image 3"


@pytest.mark.parametrize("resize", ["stretch", "square"])
def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path, resize):
    """What comes is what the whole image gives, but for a rounding here and there."""
    gen = np.random.default_rng(0)
    coarse = Image.fromarray(gen.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    path = tmp_path / "large.jpg"
    coarse.resize((600, 400), Image.Resampling.BICUBIC).save(path, quality=92)
    assert open_image(path).size == (600, 400)
    assert open_image(path, least=128).size == (300, 200)
    with Image.open(path) as image:
        whole = load_image(image.convert("RGB"), 64, resize)
    gap = np.abs(load_image(path, 64, resize).astype(int) - whole)
    assert gap.mean() < 1.5
    assert gap.any()


def test_a_jpeg_of_about_the_size_is_decoded_whole(tmp_path):
    """Below four times the size nothing is reduced: the values are exactly Pillow's."""
    path = save(tmp_path / "small.jpg", picture(250, 200), quality=92)
    with Image.open(path) as image:
        whole = load_image(image.convert("RGB"), 64)
    np.testing.assert_array_equal(load_image(path, 64), whole)


def as_jpeg(image, **how):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **how)
    return buffer.getvalue()


def photograph(width=333, height=250):
    gen = np.random.default_rng(0)
    coarse = Image.fromarray(gen.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


needs_simplejpeg = pytest.mark.skipif(
    images._simplejpeg() is None, reason="simplejpeg is not installed"
)


@needs_simplejpeg
@pytest.mark.parametrize("least", [0, 31, 40, 62, 100, 250])
@pytest.mark.parametrize(
    "how",
    [{}, {"quality": 30, "subsampling": 0}, {"progressive": True}, {"subsampling": 1}],
    ids=["usual", "whole colours", "progressive", "half colours"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_are_the_same_to_the_pixel_by_simplejpeg(least, how, mode, monkeypatch):
    """At every fraction of their size that Pillow would take."""
    data = as_jpeg(photograph().convert(mode), **how)
    quick = images._quickly(data, least)
    assert quick is not None
    monkeypatch.setattr(images, "_quickly", lambda *_: None)
    expected = images.decoded(data, "it", least).convert("RGB")
    assert quick.size == expected.size
    assert np.array_equal(quick, expected)


@needs_simplejpeg
def test_pillow_looks_at_what_is_not_plain(monkeypatch):
    """Turned by EXIF, four colours, damage, size; and at everything without the library."""
    plain = as_jpeg(photograph())
    turned = Image.Exif()
    turned[0x0112] = 6
    others = {
        "turned": as_jpeg(photograph(), exif=turned),
        "four colours": as_jpeg(photograph().convert("CMYK")),
        "cut off": plain[: len(plain) // 2],
        "no JPEG": b"\xff\xd8 and nothing else",
    }
    for name, data in others.items():
        assert images._quickly(data, 0) is None, name
    assert images.decoded(others["turned"], "it").size == (250, 333)
    with pytest.raises(ImageError, match="is damaged"):
        images.decoded(others["cut off"], "it")
    assert images._quickly(plain, 0) is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 333 * 249)
    assert images._quickly(plain, 0) is None
    monkeypatch.undo()
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    assert images._quickly(plain, 0) is None


# What is not what it seems.


def pages(kind):
    several = [Image.new("L", (16, 16), level) for level in (10, 200, 90)]
    buffer = io.BytesIO()
    several[0].save(buffer, kind, save_all=True, append_images=several[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_several_pages_are_refused(tmp_path, kind):
    """Rather than the first of them taken for the picture."""
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(pages(kind))
    with pytest.raises(ImageError, match=r"holds 3 pages or frames: save each"):
        open_image(path)


def test_white_zero_of_16_bits_is_turned_over(tmp_path):
    """As Pillow itself does for 8 bits."""
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    tags = ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tags)
    wanted = ((65535 - values.astype(float)) / 257).round()
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.tif"))[..., 0], wanted)


def test_whatever_a_decoder_raises_is_the_files_fault(tmp_path):
    """A palette with more opacities than colours; a JPEG sampled as the fast library cannot."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 4, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=b"\x00" * 4)
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"tRNS")
    body = b"tRNS" + b"\x00" * 600
    longer = struct.pack(">I", 600) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(data[: at - 4] + longer + data[at + 12 :])
    with suppress(ImageError):  # either will do, a traceback will not
        assert open_image(tmp_path / "a.png").mode == "RGB"
    jpeg = bytearray(as_jpeg(photograph(), subsampling=0))
    at = jpeg.index(b"\xff\xc0") + 11  # the first colour's sampling
    jpeg[at] = 0x41
    (tmp_path / "b.jpg").write_bytes(jpeg)
    assert open_image(tmp_path / "b.jpg").mode == "RGB"


def test_16_bits_in_planes_are_refused(tmp_path):
    """Pillow would mix the planes up."""
    path, planes = tmp_path / "a.tif", np.zeros((3, 16, 16), np.uint16)
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="interleaved"):
        open_image(path)


def test_a_tensor_is_one_image():
    """Of shape (3, H, W) it is refused, and not taken for three grey ones."""
    with pytest.raises(ImageError, match=r"has shape \(3, 16, 20\)"):
        open_image(torch.zeros(3, 16, 20))
    assert _is_one(torch.zeros(3, 16, 20))
    assert not _is_one([np.zeros((16, 16), np.uint8)])
