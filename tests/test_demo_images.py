"""The embedded demo is real texture, honestly cut, with defects one can see."""

import hashlib
import socket
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from msvae.core.errors import DataError
from msvae.data.demo import DEFECTS, EACH, TEST_GOOD, TILE, write_demo
from msvae.data.folder import find_images, find_labelled
from msvae.data.images import digest
from msvae.data.split import split_by_content


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "tree")


def place(path: Path) -> tuple[str, int, int]:
    photo, row, column = path.stem.removesuffix("_mask").split("_")
    return photo, int(row[1:]), int(column[1:])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(float)


def untouched(path: Path, size: int = 64) -> np.ndarray:
    """The tile straight from the photograph."""
    photo, row, column = place(path)
    cut = getattr(skimage.data, photo)()[row * TILE :, column * TILE :][:TILE, :TILE]
    by = Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(cut).resize((size, size), by)).astype(float)


def test_counts_suffice_for_the_demo(demo):
    """Enough to train, at least 60 to calibrate, 64 test normals, 20 anomalies of each kind."""
    train = find_images(demo).paths
    split = split_by_content([digest(p) for p in train])
    assert len(train) >= 400
    assert len(split.conformal) >= 60
    kinds = [s.kind for s in find_labelled(demo)]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "good": TEST_GOOD,
        **dict.fromkeys(DEFECTS, EACH),
    }


def test_no_two_images_share_a_pixel(demo):
    """Every tile of the three photographs is in one place only."""
    files = [p for p in demo.rglob("*.png") if "ground_truth" not in p.parts]
    assert len(files) == 3 * (512 // TILE) ** 2
    assert len({place(p) for p in files}) == len(files)


def test_normal_tiles_are_the_photographs(demo):
    """Nothing but cutting and enlarging happened to normal tiles."""
    for path in [*find_images(demo).paths[::40], *(demo / "test" / "good").glob("*_c03.png")]:
        np.testing.assert_array_equal(pixels(path), untouched(path))


@pytest.mark.parametrize("kind", list(DEFECTS))
def test_defects_are_clear_and_where_the_mask_says(demo, kind):
    """The picture differs from the photograph inside the mask, plainly, and hardly outside."""
    for sample in find_labelled(demo):
        if sample.kind != kind:
            continue
        assert sample.mask is not None
        mask = pixels(sample.mask) > 0
        change = np.abs(pixels(sample.path) - untouched(sample.path))
        assert 0.01 <= mask.mean() <= 0.16
        assert change[mask].mean() > 20
        near = np.pad(mask, 4)
        near = np.any(
            [np.roll(near, (a, b), (0, 1)) for a in range(-4, 5) for b in range(-4, 5)], axis=0
        )[4:-4, 4:-4]
        assert change[~near].max(initial=0) <= 24
        assert change[~near].mean() < 0.5


def listing(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def test_the_seed_decides_and_an_older_demo_is_replaced(demo, tmp_path):
    """Same seed, same bytes; another seed leaves no file of the first behind."""
    out = write_demo(tmp_path / "tree", size=32, seed=1)
    assert pixels(find_images(out).paths[0]).shape == (32, 32)
    assert listing(write_demo(out)) == listing(demo)
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    """Nothing of the user's is overwritten; an empty folder serves."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(DataError, match="something else"):
            write_demo(taken)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert find_images(write_demo(tmp_path / "empty", size=16)).paths


def test_nothing_is_fetched(tmp_path, monkeypatch):
    """The demo works without a network."""
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a connection"))
    assert find_images(write_demo(tmp_path / "a", size=16)).paths
