"""Thousands of damaged image files: each is read, or refused with a reason."""

import io
import random
import resource
import sys
import time
from contextlib import suppress

import numpy as np
from PIL import Image, features

from msvae.core.errors import ImageError
from msvae.data.images import load_image
from msvae.data.masks import load_mask

SLOWEST = 30.0  # seconds a file
LARGEST = 2e9  # bytes that the process may grow by


def whole_files():
    """One file of every format and mode, by name."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (48, 64), dtype=np.uint16))
    kinds = {
        **{f"{mode}.png": (colours.convert(mode), {}) for mode in ("1", "L", "LA", "P", "RGBA")},
        "deep.png": (deep, {}),
        "colour.png": (colours, {}),
        **{f"{mode}.jpg": (colours.convert(mode), {}) for mode in ("L", "CMYK")},
        "plain.jpg": (colours, {}),
        "progressive.jpg": (colours, {"progressive": True}),
        "deep.tiff": (deep, {}),
        "floats.tiff": (Image.fromarray(rng.random((48, 64), dtype=np.float32)), {}),
        **{
            f"{how}.tiff": (colours, {"compression": how})
            for how in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        },
        "a.bmp": (colours, {}),
        "a.gif": (colours.convert("P"), {}),
        "a.webp": (colours, {}),
        "a.ppm": (colours, {}),
        "a.tga": (colours, {"compression": "tga_rle"}),
        "a.pcx": (colours, {}),
    }
    if features.check("jpg_2000"):
        kinds["a.jp2"] = (colours, {})
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        ending = "." + name.rpartition(".")[2]
        image.save(buffer, Image.registered_extensions()[ending], **options)
        yield name, buffer.getvalue()


def damaged(data, chance):
    """The bytes cut off, flipped, filled with zeros, doubled, mixed, or with a wild number."""
    data, at = bytearray(data), chance.randrange(len(data))
    end = min(len(data), at + chance.randrange(1, 64))
    how = chance.randrange(6)
    if how == 0:
        del data[at:]
    elif how == 1:
        for _ in range(chance.randrange(1, 20)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == 2:
        data[at:end] = bytes(end - at)
    elif how == 3:
        data[at:at] = data[at:end]
    elif how == 4:
        data[at:end] = chance.randbytes(end - at)
    else:  # in the head, where sizes stand
        head = chance.randrange(min(len(data), 64))
        data[head : head + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(data)


def test_damaged_files_are_read_or_refused(tmp_path, tries, say):
    """As pictures and as masks; no other error, none that takes long, no memory that grows."""
    chance, files = random.Random(0), list(whole_files())
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for i in range(tries(3000, 300)):
        name, data = files[i % len(files)]
        path = tmp_path / f"{i}-{name}"
        path.write_bytes(damaged(data, chance))
        began = time.monotonic()
        for read in (load_image, load_mask):
            with suppress(ImageError):
                assert len(read(path, 32)) == 32
                continue
            refused += read is load_image
        assert time.monotonic() - began < SLOWEST, path.name
        path.unlink()
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < LARGEST
    say(f"damaged files: {i + 1} tried, {i + 1 - refused} read, {refused} refused, 0 failed")
