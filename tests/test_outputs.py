"""Maps and explanations as files."""

import hashlib
import json

import pytest
from PIL import Image

from folders import read, smooth_images, write
from msvae import explain, load
from msvae.core.errors import DataError
from msvae.run.outputs import map_writer, write_explanations


def test_maps_are_written_one_by_one(tree_run, tmp_path):
    """A picture of at most 512 px and the floats, for each image that could be read."""
    large = Image.fromarray(smooth_images(1, 4)[0]).resize((900, 600))
    large.save(tmp_path / "large.png")
    (tmp_path / "bad.png").write_text("no picture")
    detector = load(tree_run)
    paths = [str(tmp_path / "bad.png"), str(tmp_path / "large.png")]
    detector.scan(paths, each_map=map_writer(tmp_path / "maps", paths, detector))
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"large.png", "large.tiff"}
    with Image.open(tmp_path / "maps" / "large.png") as picture:
        assert picture.size == (512, 341 + 30)  # above its bar of colours
    with Image.open(tmp_path / "maps" / "large.tiff") as floats:
        assert (floats.mode, floats.size) == ("F", (32, 32))


def test_explanations_of_equal_stems_do_not_collide(tree_run, tmp_path):
    """Two files of the same name get a hash of their path; both are there."""
    paths = []
    for folder in ("a", "b"):
        write(tmp_path / folder, smooth_images(1, 4))
        paths.append(str(tmp_path / folder / "00.png"))
    written = write_explanations(load(tree_run), paths, tmp_path / "out")
    assert not (tmp_path / "out" / "quarantine.csv").exists()
    names = [f"00-{hashlib.sha256(p.encode()).hexdigest()[:8]}" for p in paths]
    assert [p.stem for p in written] == names
    for path, name in zip(paths, names, strict=True):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["image"] == path


def test_explaining_a_folder(tree_run, tmp_path):
    """`msvae.explain`: a picture and its numbers for each image, those of `Detector.explain`."""
    folder = write(tmp_path / "new", smooth_images(2, 4))
    (folder / "bad.png").write_text("no picture")
    written = explain(tree_run, folder, tmp_path / "out")
    assert [p.name for p in written] == ["00.png", "01.png"]
    told = json.loads((tmp_path / "out" / "01.json").read_text())
    expected = load(tree_run).explain(folder / "01.png").to_json()
    assert told["image"] == str(folder / "01.png")
    assert told["scores"] == pytest.approx(expected["scores"], rel=1e-3, abs=1e-4)
    with Image.open(written[0]) as picture:
        assert min(picture.size) > 500
    (row,) = read(tmp_path / "out" / "quarantine.csv")
    assert row["path"].endswith("bad.png")
    with pytest.raises(DataError, match="none of 1 images could be read"):
        explain(tree_run, folder / "bad.png", tmp_path / "none")
