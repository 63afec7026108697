"""A class keeps its number whatever becomes of its images; labels that cannot be right are one line."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.data.labels import MOST_CLASSES, labels_of, numbered, require_one_split
from reference_trainer.errors import UserError

NAMES = ["00000/a.png", "00000/b.png", "00001/c.png"]
Said = pytest.CaptureFixture


def by_table(labels: Any, names: list[str] = NAMES) -> list[int] | None:
    found = labels_of(names, [], json.dumps({"labels": labels}).encode(), "below x")
    return None if found is None else found.of.tolist()


# Folders


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["2.png", "a/1.png"], ["all/1.png", "all/2.png"]])
def test_without_class_folders_for_all_there_are_no_labels(names: list[str]):
    assert labels_of(names, ["a", "all"], None, "below x") is None


@given(st.lists(st.sampled_from("abcdef"), min_size=1), st.sets(st.sampled_from("abcdef")))
def test_classes_are_numbered_by_name_and_the_empty_ones_keep_theirs(tops: list[str], empty: set[str]):
    names = [f"{top}/{number}.png" for number, top in enumerate(tops)]
    found = labels_of(names, empty, None, "below x")
    if len(set(tops)) < 2:
        assert found is None
        return
    assert found is not None
    expected = sorted(set(tops) | empty)
    assert found.names == tuple(expected)
    assert [expected[label] for label in found.of.tolist()] == tops


def test_an_empty_class_folder_is_said_with_its_number(capsys: Said):
    labels_of(["cats/1.png", "eels/1.png"], ["cats", "dogs", "eels"], None, "below x")
    assert "1 of 3 class folders below x have no images: dogs (class 1); they keep" in capsys.readouterr().out
    labels_of(["cats/1.png", "eels/1.png"], ["cats", "eels"], None, "below x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("tops", "asked"),
    [
        (["train", "val"], True),
        (["Train", "cats", "test"], True),
        (["train"], True),
        (["train", "bus", "car"], False),  # a class of vehicles
        (["trains", "values"], False),
    ],
)
def test_folders_named_for_a_purpose_are_no_classes(tops: list[str], asked: bool):
    names = [f"{top}/cats/1.png" for top in tops]
    if not asked:
        require_one_split(names, "below x")
        return
    with pytest.raises(UserError, match=r"the images below x are in .*: say which to read with --split, as in --split"):
        require_one_split(names, "below x")


# dataset.json


def test_a_table_gives_labels_by_name_in_any_order():
    assert by_table([[NAMES[2], 1], [NAMES[0], 0], [NAMES[1].replace("/", "\\"), 4]]) == [0, 4, 1]


def test_a_table_counts_up_to_its_largest_label():
    found = labels_of(NAMES, [], json.dumps({"labels": [[name, 7] for name in NAMES]}).encode(), "below x")
    assert found is not None
    assert (found.classes, found.names) == (8, None)


def test_a_table_without_labels_means_that_folders_are_no_classes():
    assert by_table(None) is None
    assert labels_of(NAMES, [], None, "below x") is not None


@pytest.mark.parametrize("content", [b'{"other": 1}', b"[]", b"3"])
def test_a_table_of_another_kind_is_not_ours(content: bytes):
    found = labels_of(NAMES, [], content, "below x")
    assert found is not None
    assert found.names == ("00000", "00001")


def test_names_of_the_table_that_are_not_there_are_said(capsys: Said):
    assert by_table([[name, 1] for name in [*NAMES, "x.png", "y.png"]]) == [1, 1, 1]
    assert "2 of 5 images of dataset.json below x are not there: x.png, y.png" in capsys.readouterr().out


ZEROS = [[name, 0] for name in NAMES]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (ZEROS[:1], r"has no label for 2 of 3 images \(00000/b.png, 00001/c.png\): add them"),
        ([*ZEROS, [NAMES[0], 1]], r"has 00000/a.png twice, with different labels"),
        ([*ZEROS[:2], [NAMES[2], -1]], r"label 2 of dataset.json below x is -1, expected a whole number from 0 to"),
        ([*ZEROS[:2], [NAMES[2], MOST_CLASSES]], rf"is {MOST_CLASSES}, expected a whole number from 0 to"),
        ([*ZEROS[:2], [NAMES[2], 1.0]], r"is 1.0, expected a whole number"),
        ([*ZEROS[:2], [NAMES[2], True]], r"is True, expected a whole number"),
        ([*ZEROS[:2], [NAMES[2], [0, 1]]], r"is \[0, 1\], expected a whole number"),
        ([*ZEROS[:2], NAMES[2]], r'entry 2 of "labels" is .*, expected a name and a number'),
        ("photos", r'entry 0 of "labels" is .photos., expected a name and a number'),
    ],
)
def test_labels_that_cannot_be_right_are_one_line(labels: Any, message: str):
    with pytest.raises(UserError, match=message) as caught:
        by_table(labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_table_that_is_no_json_is_refused(content: bytes):
    with pytest.raises(UserError, match=r"dataset.json below x is no JSON \(.*\): mend it, or take it away"):
        labels_of(NAMES, [], content, "below x")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=8))
def test_any_table_is_understood_or_refused(labels: Any):
    with suppress(UserError):
        by_table(labels)


# Columns


@pytest.mark.parametrize("value", [-1, 3, None])
def test_a_label_outside_of_the_names_is_refused(value: Any):
    with pytest.raises(UserError, match=rf"label 1 of x is {value}, expected a whole number from 0 to 2"):
        numbered([0, value], "of x", ("a", "b", "c"))


def test_names_count_though_nothing_is_called_by_them():
    found = numbered([0, 1], "of x", ("a", "b", "c"))
    assert found is not None
    assert found.classes == 3


@pytest.mark.parametrize(("values", "names"), [([0, 0], None), ([0], ("a",)), ([], None)])
def test_one_class_is_none(values: list[int], names: tuple[str, ...] | None):
    assert numbered(values, "of x", names) is None
