"""What masks mark, in every encoding, and which pictures they belong to, in every layout."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from msvae.core.errors import DataError, ImageError
from msvae.data.folder import find_images, find_labelled, find_pairs
from msvae.data.masks import load_mask, mask_of

SIDE = 16
DEFECT = np.zeros((SIDE, SIDE), bool)
DEFECT[2:6, 3:9] = True
OTHER = np.zeros_like(DEFECT)  # a second class, darker
OTHER[10:13, 1:4] = True
BOTH = DEFECT | OTHER


def grey(value, other=0, dtype=np.uint8):
    """Values of both classes on background 0."""
    return (DEFECT * value + OTHER * other).astype(dtype)


def coloured(rgb, ground=(0, 0, 0)):
    return np.where(DEFECT[..., None], rgb, ground).astype(np.uint8)


def with_alpha(rgb, alpha=255):
    """A colour on transparent ground that is white beneath."""
    return np.dstack([coloured(rgb, (255, 255, 255)), (DEFECT * alpha).astype(np.uint8)])


def palette(transparent=None, order=(0, 1)):
    """Indices 0 and 1; index 0 is bright, so that its colour misleads."""
    image = Image.fromarray(np.where(DEFECT, order[1], order[0]).astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 10, 0, 0, 0, 0, 0])
    return image, {} if transparent is None else {"transparency": transparent}


def inverted_16():
    """A TIFF whose 0 is white: background is 65535 in the file."""
    tags = ImageFileDirectory_v2()
    tags[262] = 0
    return Image.fromarray(65535 - grey(65535, dtype=np.uint16)), {"tiffinfo": tags}


ENCODINGS = {
    "8 bits.png": (grey(255), DEFECT),
    "class 1.png": (grey(1), DEFECT),
    "classes 1 and 2.png": (grey(2, 1), BOTH),
    "classes 255 and 100.png": (grey(255, 100), BOTH),
    "classes 128 and 1.png": (grey(128, 1), BOTH),
    "1 bit.png": (Image.fromarray(DEFECT), DEFECT),
    "16 bits.png": (grey(65535, dtype=np.uint16), DEFECT),
    "16 bits, class 1.png": (grey(1, dtype=np.uint16), DEFECT),
    "16 bits, classes 1 and 300.png": (grey(300, 1, np.uint16), BOTH),
    "16 bits, class 1.tif": (grey(1, dtype=np.uint16), DEFECT),
    "32 bits, class 1.tif": (grey(1, dtype=np.int32), DEFECT),
    "32 bits, class 70000.tif": (grey(70000, dtype=np.int32), DEFECT),
    "floats 0 and 1.tif": (grey(1, dtype=np.float32), DEFECT),
    "floats 0 and 255.tif": (grey(255, dtype=np.float32), DEFECT),
    "floats 0 and 0.01.tif": (grey(0.01, dtype=np.float32), DEFECT),
    "0 is white.tif": (inverted_16(), DEFECT),
    "white.png": (coloured((255, 255, 255)), DEFECT),
    "dark red.png": (coloured((9, 0, 0)), DEFECT),
    "blue.bmp": (coloured((0, 0, 255)), DEFECT),
    "white on clear.png": (with_alpha((255, 255, 255)), DEFECT),
    "red on clear.png": (with_alpha((255, 0, 0)), DEFECT),
    "black on clear.png": (with_alpha((0, 0, 0)), DEFECT),
    "faint on clear.png": (with_alpha((200, 200, 200), 3), DEFECT),
    "opaque, white on black.png": (np.dstack([coloured((255,) * 3), grey(0) + 255]), DEFECT),
    "grey on clear.png": (np.dstack([grey(80), grey(255)]), DEFECT),
    "palette.png": (palette(), DEFECT),
    "palette.gif": (palette(), DEFECT),
    "palette, background clear.png": (palette(0), DEFECT),
    "palette, background 2 and clear.png": (palette(2, (2, 1)), DEFECT),
    "palette, opacities.png": (palette(b"\x00\xff\xff"), DEFECT),
    "grey, 7 is clear.png": ((grey(9) + ~DEFECT * np.uint8(7), {"transparency": 7}), DEFECT),
    "lossless.webp": (coloured((255, 255, 255)), DEFECT),
    "lossy.jpg": (grey(255), DEFECT),
    "empty.png": (grey(0), DEFECT & False),
}  # fmt: skip


def save(path, content):
    image, options = content if isinstance(content, tuple) else (content, {})
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    how = {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(path.suffix, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how, **options)
    return path


@pytest.mark.parametrize("name", ENCODINGS)
def test_whatever_is_not_background_is_defect(tmp_path, name):
    """At any depth, in any mode; every pixel."""
    content, wanted = ENCODINGS[name]
    np.testing.assert_array_equal(load_mask(save(tmp_path / name, content), SIDE), wanted)


def test_a_mask_of_everything_is_warned_of(tmp_path):
    """It is taken as it is, and asked about."""
    path = save(tmp_path / "all.png", grey(0) + 255)
    with pytest.warns(UserWarning, match="marks the whole picture"):
        assert load_mask(path, SIDE).all()


def deep_png(rgb):
    """The bytes of a PNG of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    head = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 16, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_masks_that_cannot_be_read_are_refused(tmp_path):
    """Rather than taken for empty: no numbers, and class 1 in 16 bits a channel, of which 8 are read."""
    nothing = save(tmp_path / "m.tif", np.full((SIDE, SIDE), np.nan, np.float32))
    with pytest.raises(ImageError, match="not finite"):
        load_mask(nothing, SIDE)
    deep = tmp_path / "m.png"
    deep.write_bytes(deep_png(np.ones((SIDE, SIDE, 3), np.uint16)))
    with pytest.raises(ImageError, match="16 bits a channel"):
        load_mask(deep, SIDE)
    deep.write_bytes(deep_png(DEFECT[..., None] * np.full(3, 65535, np.uint16)))
    np.testing.assert_array_equal(load_mask(deep, SIDE), DEFECT)


# Which picture a mask belongs to.

LAYOUTS = {
    "MVTec": ("test/cut/0.png", "ground_truth/cut/0_mask.png"),
    "bare name": ("test/cut/0.png", "ground_truth/cut/0.png"),
    "label": ("test/cut/0.png", "ground_truth/cut/0_label.bmp"),
    "gt": ("test/cut/0.jpg", "ground_truth/cut/0_gt.png"),
    "point mask": ("test/cut/0.jpg", "ground_truth/cut/0.mask.png"),
    "mirrored subfolders": ("test/cut/lot1/0.png", "ground_truth/cut/lot1/0_mask.png"),
    "LOCO": ("test/cut/0.png", "ground_truth/cut/0/000.png"),
    "one folder deeper": ("test/cut/0.png", "ground_truth/cut/deep/0_mask.png"),
    "beside": ("test/cut/0.png", "test/cut/0_mask.png"),
    "label beside": ("test/cut/0.bmp", "test/cut/0_label.bmp"),
    "PNG beside JPEG": ("test/cut/0.jpg", "test/cut/0.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_paired(tmp_path, layout):
    """The mask's pixels are the picture's, and no mask is tested as a picture."""
    picture, mask = (tmp_path / name for name in LAYOUTS[layout])
    save(picture, coloured((90, 90, 90), (60, 60, 60)))
    save(mask, grey(255))
    save(tmp_path / "test" / "good" / "0.png", coloured((60, 60, 60), (60, 60, 60)))
    odd, good = find_labelled(tmp_path)
    assert (odd.path, odd.label, good.label) == (picture, 1, 0)
    np.testing.assert_array_equal(load_mask(odd.mask, SIDE), DEFECT)
    if layout != "one folder deeper":  # there only the stems tell
        np.testing.assert_array_equal(load_mask(mask_of(picture), SIDE), DEFECT)


def test_several_masks_of_a_picture_are_joined(tmp_path):
    """A folder named as the picture holds one mask for each defect."""
    save(tmp_path / "odd/0.png", grey(90))
    save(tmp_path / "masks/0/a.png", grey(255))
    save(tmp_path / "masks/0/b.png", grey(0, 1))
    save(tmp_path / "n/0.png", grey(90))
    _, odd = find_pairs(tmp_path / "n", tmp_path / "odd", tmp_path / "masks")
    np.testing.assert_array_equal(load_mask(odd.mask, SIDE), BOTH)


def test_pictures_of_equal_stems_get_masks_of_their_own(tmp_path):
    """By the relative path; where only the stem could tell, and two would do, it is refused."""
    for lot, values in (("lot1", grey(255)), ("lot2", grey(0, 255))):
        save(tmp_path / "odd" / lot / "000.png", grey(90))
        save(tmp_path / "masks" / lot / "000_mask.png", values)
    save(tmp_path / "n/0.png", grey(90))
    arguments = (tmp_path / "n", tmp_path / "odd", tmp_path / "masks")
    marks = [load_mask(s.mask, SIDE) for s in find_pairs(*arguments) if s.label]
    np.testing.assert_array_equal(marks, [DEFECT, OTHER])
    (tmp_path / "masks/lot2/000_mask.png").rename(tmp_path / "masks/000_mask.png")
    with pytest.raises(DataError, match="relative path"):
        find_pairs(*arguments)
    save(tmp_path / "masks/lot1/000.png", grey(255))
    with pytest.raises(DataError, match="could be its mask"):
        find_pairs(*arguments)


def test_masks_are_no_pictures(tmp_path):
    """Beside their picture or in a folder of masks they are passed over and counted; others stay."""
    for name in ("a.png", "a_mask.png", "b.jpg", "b.png", "gas_mask.png", "masks/a.png"):
        save(tmp_path / name, grey(200))
    (tmp_path / "readme.txt").touch()
    listing = find_images(tmp_path)
    assert [p.name for p in listing.paths] == ["a.png", "b.jpg", "gas_mask.png"]
    assert "passed over: 3 masks, 1 .txt" in listing.note
    listing = find_images(tmp_path, pngs=False)  # of what is scored
    assert [p.name for p in listing.paths] == ["a.png", "b.jpg", "b.png", "gas_mask.png"]


def test_linked_folders_are_followed_once(tmp_path):
    """A link to a folder is entered, a link in a circle is not."""
    save(tmp_path / "elsewhere/1.png", grey(200))
    save(tmp_path / "all/0.png", grey(200))
    (tmp_path / "all/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "all", target_is_directory=True)
    assert [p.name for p in find_images(tmp_path / "all").paths] == ["0.png", "1.png"]


def test_images_are_not_counted_twice(tmp_path):
    """An anomalous folder within the normal one."""
    save(tmp_path / "0.png", grey(200))
    save(tmp_path / "bad/1.png", grey(200))
    with pytest.raises(DataError, match="name folders of which none holds the other"):
        find_pairs(tmp_path, tmp_path / "bad")
