"""Pages: each needs nothing from outside, and shows what was computed."""

import shutil

import numpy as np
import pytest

from msvae import load, report
from msvae.core.errors import DataError
from msvae.report.build import page_of
from pages import written


def test_the_page_of_a_run(judged, tree_run, tmp_path):
    """Every score, the maps, the galleries, and the file that could not be read."""
    text = written(page_of(tree_run), tmp_path / "report.html")
    for name in judged.table.scores:
        assert name in text
    for heading in ("Most anomalous", "Borderline", "Most unusual training images"):
        assert heading in text
    assert "Where in the picture" in text
    assert "What each part is worth" in text
    assert "without structure" in text
    assert "bad.png" in text
    assert "not an image" in text


def test_the_page_of_a_run_that_was_not_evaluated(tree_run, tmp_path):
    """Its training and its most unusual images, without figures that nobody measured."""
    copy = shutil.copytree(tree_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    text = written(page_of(copy), tmp_path / "report.html")
    assert "Most unusual training images" in text
    assert "Most anomalous" not in text


def test_the_most_unusual_training_images_come_first(tree_run):
    """Those with the highest fused score among the references, highest first."""
    (gallery,) = [g for g in page_of(tree_run).galleries if "unusual" in g.title]
    r = load(tree_run).references
    order = np.argsort(-r.fused, kind="stable")[: len(gallery.items)]
    assert [i.name for i in gallery.items] == [r.names[k] for k in order]


def test_the_page_of_a_table(judged, tree_run, tmp_path):
    """Of any scores.csv; with its run the maps are shown; images that are gone are left out."""
    path = tmp_path / "mine.csv"
    judged.table.write_csv(path)
    plain = written(page_of(path), tmp_path / "plain.html")
    drawn = written(page_of(path, run=tree_run), tmp_path / "drawn.html")
    for name in judged.table.scores:
        assert name in plain
    assert "Unusual features" in drawn
    assert "Unusual features" not in plain
    text = path.read_text().replace(f"{tree_run.parent}", "/gone")
    (tmp_path / "gone.csv").write_text(text)
    empty = written(page_of(tmp_path / "gone.csv"), tmp_path / "gone.html")
    assert "data:image/webp" not in empty


def test_a_page_of_a_foreign_table(tmp_path):
    """Another program's scores: a path and some numbers are enough."""
    (tmp_path / "x.csv").write_text("path,label,fused,mine\na,0,0.1,3\nb,1,0.9,2\nc,0,0.2,1\n")
    text = written(page_of(tmp_path / "x.csv"), tmp_path / "x.html")
    assert "x.csv" in text


def test_no_page_of_nothing(tmp_path):
    """A folder that is neither run nor benchmark, or a path that is not there."""
    for source in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError, match="neither a run, a benchmark nor a file of scores"):
            page_of(source)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        page_of(tmp_path)


def test_the_page_is_written_where_one_looks(judged, tree_run, tmp_path):
    """`msvae.report`: beside the scores, in the folder of the run, or where one says."""
    path = tmp_path / "mine.csv"
    judged.table.write_csv(path)
    assert report(path) == tmp_path / "mine.html"
    copy = shutil.copytree(tree_run, tmp_path / "run")
    assert report(copy) == copy / "report.html"
    assert report(copy, out=tmp_path / "x.html") == tmp_path / "x.html"
    for page in (tmp_path / "mine.html", copy / "report.html", tmp_path / "x.html"):
        assert "<html" in page.read_text()
