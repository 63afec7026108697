"""What is on disk is either the old file or the whole new one, and damage is noticed."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.errors import UserError
from reference_trainer.files import as_json, load_tensors, save_tensors, write_atomically
from reference_trainer.run import RunFolder

TENSORS = {
    "weights": torch.randn(3, 5),
    "step": torch.tensor(7),
    "half": torch.ones(2).bfloat16(),
    "empty": torch.zeros(0),
}


def test_tensors_come_back_bit_for_bit(tmp_path: Path):
    save_tensors(tmp_path / "deep" / "x.safetensors", TENSORS, {"step": 3})
    back, about = load_tensors(tmp_path / "deep" / "x.safetensors")
    assert about == {"step": 3}
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_loaded_tensors_do_not_change_with_the_file(tmp_path: Path):
    save_tensors(tmp_path / "x.safetensors", TENSORS, {})
    loaded, _ = load_tensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(bytes(1000))
    assert torch.equal(loaded["weights"], TENSORS["weights"])


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(where: float, bit: int, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("store") / "x.safetensors"
    save_tensors(file, {"weights": torch.ones(64)}, {})
    damaged = bytearray(file.read_bytes())
    data_start = len(damaged) - 256  # in the data; the header is parsed, and refused there
    damaged[data_start + int(where * 256)] ^= 1 << bit
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        load_tensors(file)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_noticed(share: float, tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, TENSORS, {})
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cannot read"):
        load_tensors(file)


def test_a_pickle_is_refused(tmp_path: Path):
    torch.save(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        load_tensors(tmp_path / "x.safetensors")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "x.safetensors"
    save_tensors(file, TENSORS, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_tensors(file, TENSORS, {"step": 2})
    assert load_tensors(file)[1] == {"step": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "file" / "x", b"")


NUMBERS = st.floats() | st.integers() | st.none() | st.booleans() | st.text(max_size=3)
TREES = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def with_null_for_what_is_not_finite(value: object) -> object:
    if isinstance(value, list):
        return [with_null_for_what_is_not_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: with_null_for_what_is_not_finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(TREES)
def test_json_is_always_json_and_nothing_finite_changes(tree: object):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = as_json(tree)
    assert json.loads(text, parse_constant=refuse) == with_null_for_what_is_not_finite(tree)
    assert "\n" not in text


@pytest.mark.parametrize("value", [(math.nan,), [np.float64("inf")], {"a": {"b": (1, -math.inf)}}])
def test_what_is_not_finite_becomes_null_at_any_depth(value: object):
    assert "null" in as_json(value)


def test_rows_of_a_run_are_json_even_where_a_loss_was_not_finite(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.append_row("metrics.jsonl", {"step": 1, "consistency": math.nan, "by_level": {"r": [math.inf, 1.0]}})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 2, "consistency": NaN}\n')  # of an earlier version
    run.keep_rows_until(2)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert run.metrics() == [
        {"step": 1, "consistency": None, "by_level": {"r": [None, 1.0]}},
        {"step": 2, "consistency": None},
    ]
