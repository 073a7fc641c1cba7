"""Decode once, train many times; whatever happens to the cache, the pixels are right."""

import json
import os
import threading
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msvae.core.errors import DataError
from msvae.core.files import cache_dir
from msvae.core.replacement import UNFINISHED, unfinished
from msvae.data import cache as module
from msvae.data.cache import decode
from msvae.data.images import digest, load_image


@pytest.fixture
def files(tmp_path):
    """Eight images, of which the fourth is damaged."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(path)
    paths[3].write_text("not a picture")
    return paths


def check(decoded, files):
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert decoded.kept.tolist() == kept
    assert decoded.kept.dtype == np.int64
    assert decoded.names == tuple(str(files[i]) for i in kept)
    assert decoded.digests == tuple(digest(files[i]) for i in kept)
    assert [q.name for q in decoded.quarantine] == [str(files[3])]
    for row, i in zip(decoded.pixels, kept, strict=True):
        np.testing.assert_array_equal(row, load_image(files[i], 10))


def no_decoding(monkeypatch):
    monkeypatch.setattr(module, "load_image", lambda *a, **k: pytest.fail("decoded again"))


def entry(cache: Path, end: str) -> Path:
    (path,) = cache.glob(f"*.{end}")
    return path


def test_with_and_without_cache_agree(files, tmp_path, monkeypatch):
    """The first time, from the cache, and without one: the same; the second decodes nothing."""
    check(decode(files, 10), files)
    check(decode(files, 10, cache=tmp_path / "c"), files)
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".json", ".raw"]
    no_decoding(monkeypatch)
    again = decode(files, 10, cache=tmp_path / "c")
    monkeypatch.undo()
    check(again, files)


def test_pixels_cannot_be_written_by_mistake(files, tmp_path):
    """Nobody alters the cache, or the pixels, by the way."""
    for cache in (None, tmp_path / "c", tmp_path / "c"):
        with pytest.raises(ValueError, match="read-only"):
            decode(files, 10, cache=cache).pixels[0] = 0


def test_size_resize_content_and_order_have_their_own_entries(files, tmp_path):
    """Nothing is taken from an entry of other images, another size or another order."""
    cache = tmp_path / "c"
    decode(files, 10, cache=cache)
    np.testing.assert_array_equal(
        decode(files, 10, "square", cache=cache).pixels[0], load_image(files[0], 10, "square")
    )
    assert decode(files, 11, cache=cache).pixels.shape[1:] == (11, 11, 3)
    backwards = decode(files[::-1], 10, cache=cache)
    np.testing.assert_array_equal(backwards.pixels[0], load_image(files[7], 10))
    Image.fromarray(np.zeros((12, 14, 3), np.uint8)).save(files[0])
    assert not decode(files, 10, cache=cache).pixels[0].any()


def shorten(cache: Path) -> None:
    os.truncate(entry(cache, "raw"), 100)


def alter(cache: Path) -> None:
    with entry(cache, "raw").open("r+b") as file:
        file.seek(50)
        byte = file.read(1)[0]
        file.seek(50)
        file.write(bytes([byte ^ 255]))


def lengthen(cache: Path) -> None:
    with entry(cache, "raw").open("ab") as file:
        file.write(b"x")


def age(cache: Path) -> None:
    facts = json.loads(entry(cache, "json").read_text())
    entry(cache, "json").write_text(json.dumps(facts | {"version": 0}))


def tear(cache: Path) -> None:
    entry(cache, "json").write_text('{"version":')


def lose(cache: Path) -> None:
    entry(cache, "raw").unlink()


@pytest.mark.parametrize("harm", [shorten, alter, lengthen, age, tear, lose])
def test_a_harmed_entry_is_noticed_and_rebuilt(files, tmp_path, harm, monkeypatch):
    """Torn, altered, stale or half-lost: the pixels are right, and the entry is whole again."""
    cache = tmp_path / "c"
    decode(files, 10, cache=cache)
    harm(cache)
    check(decode(files, 10, cache=cache), files)
    no_decoding(monkeypatch)
    assert len(decode(files, 10, cache=cache).pixels) == 7


def test_a_cache_that_cannot_be_written_costs_a_warning(files, tmp_path):
    """A file in the way of the folder: one line, and the work goes on in memory."""
    (tmp_path / "c").write_text("in the way")
    with pytest.warns(UserWarning, match="MSVAE_CACHE") as warned:
        check(decode(files, 10, cache=tmp_path / "c"), files)
    assert len(warned) == 1


@pytest.mark.parametrize("step", ["_reserve", "_checksum"])
def test_a_full_disk_costs_a_warning(files, tmp_path, monkeypatch, step):
    """No room, early or late: one line, right pixels, nothing left behind."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, full)
    with pytest.warns(UserWarning, match="No space left"):
        check(decode(files, 10, cache=tmp_path / "c"), files)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_broken_off_build_leaves_nothing(files, tmp_path, monkeypatch):
    """Interrupted, the cache holds no half entry; what a killed one left is swept later."""

    class Impatient:
        def track(self, items, task, total):
            if task == "decoding":
                raise KeyboardInterrupt
            yield from items

        def note(self, text):
            """Nothing."""

    with pytest.raises(KeyboardInterrupt):
        decode(files, 10, cache=tmp_path / "c", progress=Impatient())
    assert list((tmp_path / "c").iterdir()) == []
    old = tmp_path / "c" / f"{UNFINISHED}old"
    old.touch()
    with unfinished(tmp_path / "c", Path.touch) as new:
        decode(files, 10, cache=tmp_path / "c")
        assert (old.exists(), new.exists()) == (False, True)


def build(arguments: tuple[list[Path], Path]) -> int:
    files, cache = arguments
    return int(decode(files, 10, cache=cache).pixels.astype(np.int64).sum())


def test_processes_that_build_at_once_do_not_collide(files, tmp_path):
    """Four processes and four threads build one entry; all see the same, and it is whole."""
    cache = tmp_path / "c"
    expected = build((files, tmp_path / "other"))
    sums = []
    threads = [
        threading.Thread(target=lambda: sums.append(build((files, cache)))) for _ in range(4)
    ]
    with get_context("spawn").Pool(2) as pool:
        for thread in threads:
            thread.start()
        sums += pool.map(build, [(files, cache)] * 4)
        for thread in threads:
            thread.join()
    assert sums == [expected] * 8
    check(decode(files, 10, cache=cache), files)
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".raw"]


def test_images_in_memory(tmp_path):
    """Arrays and PIL images are decoded too, named by their place, and never cached."""
    arrays = [np.full((9, 9), i, np.uint8) for i in range(3)]
    arrays[1] = np.full((9, 9), np.nan)
    decoded = decode([*arrays, Image.new("RGB", (9, 9))], 8, cache=tmp_path / "c")
    assert decoded.names == ("image 0", "image 2", "image 3")
    assert decoded.quarantine[0].name == "image 1"
    assert not (tmp_path / "c").exists()


def test_a_folder_with_bad_files_still_serves(files, tmp_path):
    """Empty, truncated, too small and absent files are listed with reasons; the rest is there."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.png").write_bytes(files[0].read_bytes()[:200])
    Image.new("RGB", (7, 7)).save(tmp_path / "small.png")
    bad = [tmp_path / f"{name}.png" for name in ("empty", "half", "small", "absent")]
    for _ in range(2):  # decoded, then from the cache
        decoded = decode([*bad, *files], 10, cache=tmp_path / "c")
        assert decoded.kept.tolist() == [4, 5, 6, 8, 9, 10, 11]
        expected = ["0 bytes", "damaged", "at least 8", "cannot be read", "not an image"]
        for error, reason in zip(decoded.quarantine, expected, strict=True):
            assert reason in error.reason


def test_nothing_readable_is_an_error(files, tmp_path):
    """If no image serves, the first reason is told; so is an empty list."""
    for cache in (None, tmp_path / "c"):
        with pytest.raises(DataError, match=r"none of 1 images .* not an image"):
            decode([files[3]], 10, cache=cache)
        with pytest.raises(DataError, match="no image was given"):
            decode([], 10, cache=cache)


def test_where_the_cache_lies(monkeypatch):
    """MSVAE_CACHE, else the user's cache folder."""
    monkeypatch.delenv("MSVAE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/msvae")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "msvae"
    monkeypatch.setenv("MSVAE_CACHE", "/y")
    assert cache_dir() == Path("/y")


def test_some_of_the_images_are_read_when_they_are_asked_for(files, tmp_path):
    """By a slice or by numbers, in the order of the rows; the whole stays one map of the disk."""
    decoded = decode(files, 16, cache=tmp_path / "cache")
    rows = [len(decoded.pixels) - 1, 0]
    some = decoded.some(rows)
    assert len(some) == 2
    np.testing.assert_array_equal(some[:], decoded.pixels[rows])
    np.testing.assert_array_equal(some[np.array([1, 0, 1])], decoded.pixels[[0, rows[0], 0]])
    assert some[2:].shape == (0, 16, 16, 3)
    assert some.whole is decoded.pixels


def test_a_user_without_a_home_goes_without_a_cache(monkeypatch):
    """Neither HOME nor an entry in passwd, as in many containers: images are decoded all the same."""
    for name in ("MSVAE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_dir() is None
