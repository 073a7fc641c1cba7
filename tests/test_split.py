"""The parts are decided by content or group, so that copies never straddle."""

import hashlib
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvae.core.errors import ConfigError, DataError
from msvae.data.split import MINIMUM, group_names, number_gap_groups, split_by_content
from msvae.run.leakage import check_disjoint


def sha(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


@settings(max_examples=60, deadline=None)
@given(st.integers(MINIMUM, 400))
def test_parts_are_those_of_the_protocol(n):
    """The first 15 % by sha256 calibrate, 5 % of the rest stop, the rest trains."""
    digests = [sha(i) for i in range(n)]
    split = split_by_content(digests)
    held = math.ceil(Fraction(15, 100) * n)
    stop = math.ceil(Fraction(5, 100) * (n - held))
    order = sorted(range(n), key=lambda i: digests[i])
    assert set(split.conformal) == set(order[:held])
    assert set(split.stop) == set(order[held : held + stop])
    assert sorted(split.train + split.stop + split.conformal) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 99), max_size=12), st.integers(1, 5))
def test_copies_never_straddle(copies, spread):
    """Same content, or the same group, means the same part, whatever was copied."""
    digests = [sha(i) for i in [*range(100), *copies]]
    groups = [f"g{i // spread}" for i in range(len(digests))]
    for keys, split in (
        (digests, split_by_content(digests)),
        (digests, split_by_content(digests, groups)),
        (groups, split_by_content(digests, groups)),
    ):
        for part in (split.train, split.stop, split.conformal):
            assert part
            assert not {keys[i] for i in part} & {
                k for i, k in enumerate(keys) if i not in set(part)
            }


def test_groups_go_by_the_sha_of_their_name():
    """Of 20 groups the first 3 by sha256 of their name calibrate, the next one stops."""
    groups = [f"g{i % 20}" for i in range(60)]
    split = split_by_content([sha(i) for i in range(60)], groups)
    order = sorted(set(groups), key=sha)
    assert {groups[i] for i in split.conformal} == set(order[:3])
    assert {groups[i] for i in split.stop} == {order[3]}


def test_groups_that_share_a_copy_are_one():
    """A copy in another group drags that group along."""
    digests = [sha(i) for i in range(60)]
    digests[1] = digests[0]
    groups = [f"g{i % 20}" for i in range(60)]
    split = split_by_content(digests, groups)
    for part in (split.train, split.stop, split.conformal):
        assert len({i for i in part if i % 20 in (0, 1)}) in (0, 6)


def test_other_shares():
    """The shares are the caller's to choose."""
    split = split_by_content([sha(i) for i in range(100)], conformal=0.125, stop=0.1)
    assert (len(split.conformal), len(split.stop)) == (13, 9)


def test_too_few_are_refused_with_the_number():
    """19 distinct images and their copies are 19; two groups cannot make three parts."""
    with pytest.raises(DataError, match=r"19 distinct images .* at least 20"):
        split_by_content([sha(i % 19) for i in range(100)])
    with pytest.raises(DataError, match="2 groups: at least 3"):
        split_by_content([sha(i) for i in range(30)], ["a", "b"] * 15)


def test_group_names():
    """The group is the first bracket, or the whole match."""
    paths = ["x/part7_a.png", "x/part12_b.png"]
    assert group_names(paths, r"part\d+") == ["part7", "part12"]
    assert group_names(paths, r"part(\d+)") == ["7", "12"]
    assert group_names(paths, r"part\d+|(never)") == ["part7", "part12"]


def test_bad_expressions_are_named():
    """An expression that is none, or matches nothing in some path, is told with that path."""
    with pytest.raises(ConfigError, match="regular expression"):
        group_names(["a"], "(")
    with pytest.raises(DataError, match=r"matches nothing in x/b\.png"):
        group_names(["x/a1.png", "x/b.png"], r"\d")


def test_gaps_begin_groups():
    """A jump of more than 200 begins a group, called after its first file."""
    given_ = ["d/e1_500.jpg", "d/e1_100.jpg", "d/e9_300.jpg", "d/e1_901.jpg"]
    expected = ["e1_100.jpg", "e1_100.jpg", "e1_100.jpg", "e1_901.jpg"]
    assert number_gap_groups(given_) == expected
    with pytest.raises(DataError, match="no number"):
        number_gap_groups(["a.jpg"])


def test_the_same_content_on_both_sides_is_refused():
    """A test image that is a copy of a fitted one is named, with its copy."""
    check_disjoint(["a", "b"], ["c"], ["t.png"])
    with pytest.raises(DataError, match=r"t\.png: has the content of f\.png"):
        check_disjoint(["a", "b"], ["b"], ["t.png"], ["e.png", "f.png"])
    with pytest.raises(DataError, match=r"t\.png: has the content of an image of the run"):
        check_disjoint(["a", "b"], ["b"], ["t.png"])


def test_magnetic_tiles_group(data_dir):
    """The real near-copies fall into groups that are many enough to split."""
    files = sorted((data_dir / "magnetic-tile" / "MT_Free").rglob("*.jpg"))
    groups = number_gap_groups([f.as_posix() for f in files])
    assert len(groups) == 952
    assert 20 < len(set(groups)) < 952
