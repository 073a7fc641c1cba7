"""The score table comes back from its CSV to the bit, and a bad CSV is refused in one line."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvae.core.errors import DataError, ImageError
from msvae.evaluation.table import ScoreTable, write_quarantine

floats = st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def tables(draw):
    """Tables with any of their parts, and paths of any characters."""
    n = draw(st.integers(0, 6))

    def column(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    def maybe(values, dtype):
        return np.array(column(values), dtype=dtype) if draw(st.booleans()) else None

    names = ["fused", "kl", "spread"][: draw(st.integers(0, 3))]
    tails = names[: draw(st.integers(0, len(names)))]
    return ScoreTable(
        paths=tuple(column(texts)),
        scores={k: np.array(column(floats)) for k in names},
        p_values={k: np.array(column(floats)) for k in tails},
        p=maybe(floats, np.float64),
        flagged=maybe(st.booleans(), np.bool_),
        labels=maybe(st.integers(0, 1), np.int64),
        kinds=tuple(column(texts)) if draw(st.booleans()) else None,
    )


def parts(table):
    arrays = {"p": table.p, "flagged": table.flagged, "labels": table.labels}
    arrays |= {f"s {k}": v for k, v in table.scores.items()}
    arrays |= {f"p {k}": v for k, v in table.p_values.items()}
    return {k: v if v is None else (v.dtype, v.tobytes()) for k, v in arrays.items()}


@settings(max_examples=150, deadline=None)
@given(tables())
def test_a_table_comes_back_to_the_bit(tmp_path_factory, table):
    """Every float, path, label and decision, in the same order of columns."""
    path = tmp_path_factory.getbasetemp() / "table.csv"
    table.write_csv(path)
    back = ScoreTable.read_csv(path)
    names = [table.paths, table.kinds]
    paths, kinds = (
        t and tuple(f"./{x}" if x[:1] in "=+-@\t\r" and x else x for x in t) for t in names
    )
    assert (back.paths, back.kinds, len(back)) == (paths, kinds, len(table))
    assert list(back.scores) == list(table.scores)
    assert parts(back) == parts(table)
    first = path.read_bytes()
    back.write_csv(path)
    assert path.read_bytes() == first


def table():
    return ScoreTable(
        paths=("a.png", 'b, "2".png', "c.png"),
        scores={"kl": np.array([1.0, 2.5, 3.0]), "fused": np.array([0.1, 0.2, np.nan])},
        p_values={"kl": np.array([0.5, 0.25, 1.0]), "fused": np.array([1.0, 0.1, 0.05])},
        p=np.array([1.0, 0.1, 0.05]),
        flagged=np.array([False, False, True]),
        labels=np.array([0, 0, 1]),
        kinds=("good", "good", "hole"),
    )


def test_other_programs_can_read_it(tmp_path):
    """The columns of the contract, for any CSV reader: 0/1 for flagged, plain numbers."""
    table().write_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = ["path", "label", "kind", "kl", "fused", "p_kl", "p_fused", "p", "flagged"]
    assert list(rows[0]) == expected
    assert [r["path"] for r in rows] == ["a.png", 'b, "2".png', "c.png"]
    assert [r["flagged"] for r in rows] == ["0", "0", "1"]
    assert [float(r["kl"]) for r in rows] == [1.0, 2.5, 3.0]
    assert rows[2]["fused"] == "nan"


def test_tables_of_other_programs_can_be_read(tmp_path):
    """A path and numbers are enough; a column called p_x without x is a score."""
    (tmp_path / "t.csv").write_text("dist,path,p_value,count\n0.5,x.png,1e-3,7\n-2,y.png,inf,8\n")
    read = ScoreTable.read_csv(tmp_path / "t.csv")
    assert read.paths == ("x.png", "y.png")
    assert {k: v.tolist() for k, v in read.scores.items()} == {
        "dist": [0.5, -2.0],
        "p_value": [1e-3, np.inf],
        "count": [7.0, 8.0],
    }
    assert read.p_values == {}
    assert (read.p, read.flagged, read.labels, read.kinds) == (None,) * 4


@pytest.mark.parametrize("rows", [np.array([2, 0]), np.array([True, False, True])])
def test_some_rows_of_a_table(rows):
    """By indices in their order, or by a mask; every column goes along."""
    some = table().select(rows)
    order = [2, 0] if rows.dtype != np.bool_ else [0, 2]
    assert some.paths == tuple(table().paths[i] for i in order)
    assert some.kinds == tuple(table().kinds[i] for i in order)
    for key, column in table().columns().items():
        np.testing.assert_array_equal(some.columns()[key], [column[i] for i in order])


def test_rows_of_a_bare_table():
    """What a table has not, its rows have not."""
    bare = ScoreTable(("a", "b"), {"s": np.array([1.0, 2.0])}).select(np.array([1]))
    assert list(bare.columns()) == ["path", "s"]


BAD = {
    "": "has no column `path`",
    "name,score\nx,1\n": "has no column `path`",
    "path,score\nx,1\ny\n": "line 3: has 1 cells instead of 2",
    "path,score\nx,1,2\n": "line 2: has 3 cells instead of 2",
    "path,score\nx,1\ny,high\n": "line 3: score is 'high', not a number",
    "path,score\nx,\n": "line 2: score is '', not a number",
    "path,label\nx,good\n": "line 2: label is 'good', not a number",
    "path,flagged\nx,yes\n": "line 2: flagged is 'yes', not a number",
    f'path,score\n"{"x" * 200_000}",1\n': "is not a CSV file of scores",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_refused_in_one_line(tmp_path, text):
    """The file, the line and what is wrong there."""
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError) as refused:
        ScoreTable.read_csv(path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert BAD[text] in message
    assert len(message.splitlines()) == 1


def test_what_is_no_text_file_is_refused(tmp_path):
    """An absent file, a folder, a picture: one line each."""
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    for name, reason in (
        ("no.csv", "No such file"),
        ("", "cannot be read"),
        ("x.png", "no column `path`"),
    ):
        with pytest.raises(DataError, match=reason) as refused:
            ScoreTable.read_csv(tmp_path / name)
        assert len(str(refused.value).splitlines()) == 1


def test_the_quarantine_lists_names_and_reasons(tmp_path):
    """One row for every image that could not be used; a bare header when all could."""
    refused = [ImageError("a, b.png", 'is "damaged"'), ImageError("c.png", "has 0 bytes")]
    write_quarantine(tmp_path / "q.csv", refused)
    with (tmp_path / "q.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["path", "reason"],
            ["a, b.png", 'is "damaged"'],
            ["c.png", "has 0 bytes"],
        ]
    write_quarantine(tmp_path / "none.csv", [])
    assert (tmp_path / "none.csv").read_text() == "path,reason\n"


def test_a_table_for_a_spreadsheet(tmp_path):
    """With a byte-order mark on demand; names that look like formulas as names in their folder."""
    names = ("=cmd|x.png", "+1.png", "-1.png", "@a.png", "ü.png", "a=b.png")
    table = ScoreTable(names, {"fused": np.array([-1.0, 1, 2, 3, 4, 5])})
    table.write_csv(tmp_path / "t.csv", bom=True)
    raw = (tmp_path / "t.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbfpath,fused\n./=cmd|x.png,-1.0\n")
    back = ScoreTable.read_csv(tmp_path / "t.csv")
    assert back.paths == ("./=cmd|x.png", "./+1.png", "./-1.png", "./@a.png", "ü.png", "a=b.png")
