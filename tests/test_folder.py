"""Folders, lists and globs become paths and labelled samples."""

from pathlib import Path

import pytest

from msvae.core.errors import DataError
from msvae.data.folder import check_normal, find_images, find_labelled, find_pairs


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


MVTEC = (
    "train/good/0.png",
    "train/good/1.png",
    "test/good/0.png",
    "test/cut/0.png",
    "test/cut/1.png",
    "ground_truth/cut/0_mask.png",
    "ground_truth/cut/1.png",
)


def names(paths, root):
    return [p.relative_to(root).as_posix() for p in paths]


def test_train_good_and_nothing_else(tmp_path):
    """Of an MVTec tree exactly train/good is taken, and the note says so."""
    found = find_images(tree(tmp_path, *MVTEC))
    assert names(found.paths, tmp_path) == ["train/good/0.png", "train/good/1.png"]
    assert "train/good" in found.note
    assert "2 images" in found.note


def test_recursion_sorted_without_hidden_files_and_masks(tmp_path):
    """Everything below counts, but hidden things, other files, and PNGs beside a photo."""
    tree(tmp_path, "b/2.JPG", "a/1.png", "a/.x.png", ".git/3.png", "n.txt", "c/4.jpg", "c/4.png")
    found = find_images(str(tmp_path))
    assert names(found.paths, tmp_path) == ["a/1.png", "b/2.JPG", "c/4.jpg"]
    assert "passed over: 1 masks, 1 .txt" in found.note


def test_names_come_in_the_order_of_their_parts(tmp_path):
    """As pathlib sorts: what lies in `a` before what lies in `a-b`, files and folders mixed."""
    tree(tmp_path, "a/1.png", "a-b/1.png", "a.png", "a/b/0.png", "a/b.png", "b.png")
    assert find_images(tmp_path).paths == tuple(sorted(tmp_path.rglob("*.png")))


def test_lists_globs_and_single_files(tmp_path):
    """A list may hold files, folders and globs; what is named twice counts once."""
    tree(tmp_path, "a/1.png", "a/2.png", "b/3.png", "b/x.txt")
    assert len(find_images(f"{tmp_path}/*/*").paths) == 3
    assert len(find_images(f"{tmp_path}/**/*.png").paths) == 3
    assert find_images(tmp_path / "a" / "1.png").paths == (tmp_path / "a" / "1.png",)
    assert len(find_images([tmp_path / "a", f"{tmp_path}/*/1.png"]).paths) == 2


@pytest.mark.parametrize(
    "where, reason",
    [("nothing", "no such"), ("empty", "holds no images"), ("*.png", "matches no image")],
)
def test_nothing_found_is_said(tmp_path, where, reason):
    """No such path, an empty folder, and a pattern without a match have each their words."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        find_images(str(tmp_path / where))
    with pytest.raises(DataError, match="list of images is empty"):
        find_images([])


def test_labelled_tree(tmp_path):
    """test/good is 0, test/<defect> is 1 with its mask by either name."""
    samples = find_labelled(tree(tmp_path, *MVTEC))
    assert [(s.label, s.kind, s.mask and s.mask.name) for s in samples] == [
        (1, "cut", "0_mask.png"),
        (1, "cut", "1.png"),
        (0, "good", None),
    ]


def test_a_tree_without_masks_serves(tmp_path):
    """Image figures need no masks."""
    samples = find_labelled(tree(tmp_path, "test/good/0.png", "test/cut/0.png"))
    assert [s.mask for s in samples] == [None, None]


@pytest.mark.parametrize(
    "extra, reason",
    [
        ("ground_truth/cut/9_mask.png", "mask without an image"),
        ("test/cut/9.png", "has no mask"),
    ],
)
def test_masks_and_images_should_pair(tmp_path, extra, reason):
    """A mask without its image, or one image without a mask, is named; the rest serves."""
    whole = tree(tmp_path, *MVTEC, extra)
    with pytest.warns(UserWarning, match=reason):
        samples = find_labelled(whole)
    masked = [s.mask.name for s in samples if s.mask]
    assert masked == ["0_mask.png", "1.png"]


@pytest.mark.parametrize("left", [(), ("test/good/0.png",), ("test/cut/0.png",), ("a.png",)])
def test_another_layout_is_refused(tmp_path, left):
    """Without test/good and a defect folder the user hears of --normal and --anomalous."""
    with pytest.raises(DataError, match="--normal"):
        find_labelled(tree(tmp_path, *left))
    with pytest.raises(DataError, match="no such folder"):
        find_labelled(tmp_path / "nothing")


def test_pairs_of_folders(tmp_path):
    """Two folders give labels; masks come from a third folder or from beside the images."""
    tree(tmp_path, "n/0.png", "a/1.jpg", "a/1.png", "a/2.jpg", "m/1_mask.png", "m/2.png")
    beside = find_pairs(tmp_path / "n", tmp_path / "a")
    assert [(s.path.name, s.label) for s in beside] == [("0.png", 0), ("1.jpg", 1), ("2.jpg", 1)]
    assert [s.mask and s.mask.name for s in beside] == [None, "1.png", None]
    third = find_pairs(tmp_path / "n", tmp_path / "a", tmp_path / "m")
    assert [s.mask and s.mask.name for s in third] == [None, "1_mask.png", "2.png"]


def test_pairs_name_masks_that_fit_nothing(tmp_path):
    """Those of other images are left out and counted; a folder without any is refused."""
    tree(tmp_path, "n/0.png", "a/1.jpg", "m/7.png", "m/8.png")
    with pytest.warns(UserWarning, match=r"7.png: is a mask without an image: .* \(2 such\)"):
        samples = find_pairs(tmp_path / "n", tmp_path / "a", tmp_path / "m")
    assert [s.mask for s in samples] == [None, None]
    with pytest.raises(DataError, match="no masks"):
        find_pairs(tmp_path / "n", tmp_path / "a", tmp_path / "nothing")


def test_bottle(data_dir):
    """The real MVTec category is found whole."""
    root = data_dir / "mvtec-256" / "bottle"
    assert len(find_images(root).paths) == 209
    samples = find_labelled(root)
    assert sum(s.label == 0 for s in samples) == 20
    assert sum(s.label == 1 and s.mask is not None for s in samples) == 63


@pytest.mark.parametrize("others", [("bad",), ("defects", "ground_truth"), ("test",)])
def test_good_images_beside_others_are_no_folder_to_learn_from(tmp_path, others):
    """The user is told which folder is meant; a tree of good ones, and one with train/good, serve."""
    tree(tmp_path, "good/0.png", *[f"{name}/0.png" for name in others])
    with pytest.raises(DataError, match=r"name .*/good"):
        check_normal(tmp_path)
    check_normal(tmp_path / "good")
    check_normal(tree(tmp_path / "mvtec", *MVTEC))
    check_normal(tree(tmp_path / "lots", "lot1/0.png", "lot2/0.png"))


def test_whatever_pillow_opens_is_an_image(tmp_path):
    """Endings that Pillow knows; films, drawings that want other programs, and texts are counted."""
    known = ("0.jfif", "1.AVIF", "2.j2k", "3.pcx", "4.qoi", "5.tga")
    found = find_images(tree(tmp_path, *known, "a.heic", "b.eps", "c.mpg", "d.csv", "e"))
    assert names(found.paths, tmp_path) == list(known)
    for left in ("1 .heic", "1 .eps", "1 .mpg", "1 .csv", "1 without ending"):
        assert left in found.note
