"""Files of a run that are not what they should be get one line, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import TINY, said

from reference_trainer.__main__ import main
from reference_trainer.commands.shared import require_writable
from reference_trainer.errors import UserError
from reference_trainer.files import load_tensors, save_tensors
from reference_trainer.options import to_json
from reference_trainer.presets import digits
from reference_trainer.run import RunFolder

# --- Files that are not what they should be ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on the pixels of a few images."""
    folder = tmp_path_factory.mktemp("trained")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)
    (folder / "images").mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / "images" / f"{index}.png")
    assert main([*TINY, "--data", str(folder / "images"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def stored(**changes: object) -> bytes:
    return json.dumps(to_json(digits()) | changes).encode()


NO_CONFIGURATIONS = {
    "list": b"[]",
    "string": b'"steps"',
    "number": b"3",
    "null": b"null",
    "empty": b"",
    "part": b'{"part": "DiT"}',
    "function": b'{"part": "cauchy"}',
    "unknown key": stored(stps=3),
    "unknown part": stored(network={"part": "Transformer9000"}),
    "part of another field": stored(network={"part": "Adam"}),
    "text for a number": stored(steps="ten"),
    "number for a part": stored(objective=3),
    "true for a number": stored(steps=True),
    "half a step": stored(steps=2.5),
    "list for a number": stored(ema_decay=[0.5]),
    "refused by its owner": stored(steps=0),
    "too large": stored(seed=10**40),
    "NaN": stored(ema_decay=float("nan")),
    "Infinity": stored(ema_decay=float("inf")),
    "UTF-16": stored().decode().encode("utf-16"),
    "deep": b"[" * 100_000,
    "parts in parts": b'{"part": "DiT", "width": ' * 480 + b"1" + b"}" * 480,
}


@pytest.mark.parametrize("content", NO_CONFIGURATIONS.values(), ids=NO_CONFIGURATIONS)
@pytest.mark.parametrize("words", [["sample"], ["evaluate"], ["--out"], ["digits", "--out"]], ids=" ".join)
def test_a_config_that_is_none_gets_one_line(
    words: list[str], content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_bytes(content)
    assert main([*words, str(tmp_path)]) == 2
    assert str(tmp_path) in said(capsys)


@pytest.mark.parametrize("content", ["list", "string", "number", "null"])
def test_what_is_no_configuration_is_not_compared_with_one(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(NO_CONFIGURATIONS[content])
    with pytest.raises(UserError, match="is no configuration of a run"):
        RunFolder(tmp_path).claim(digits())


def test_a_picture_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    for name, why in (("x.nothing", "unknown file extension"), ("file/x.png", ""), (".", "is a folder")):
        with pytest.raises(
            UserError, match=f"cannot write {re.escape(str(tmp_path / name))}: .*{why}.* --out"
        ) as caught:
            require_writable(tmp_path / name)
        assert ".trial" not in str(caught.value)
    require_writable(tmp_path / "new" / "x.png")
    assert not list((tmp_path / "new").iterdir())


def claimed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A run folder of the digits whose config.json was changed as if another version had written it."""
    RunFolder(tmp_path).claim(digits())
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_run_is_not_lost_because_a_version_added_a_field(tmp_path: Path):
    def older(config: dict[str, Any]) -> None:
        del config["threads"], config["objective"]["c"]["histogram"], config["optimizer"]["max_norm"]

    root = claimed(tmp_path, older)
    RunFolder(root).claim(digits())
    with pytest.raises(UserError, match=r"another configuration \(threads: 1 -> 2\).* alone"):
        RunFolder(root).claim(replace(digits(), threads=2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.update(speed=3), "TrainConfig.speed"),
        (lambda config: config["optimizer"].update(clip=1.0), "Adam.clip"),
    ],
)
def test_a_field_that_a_version_took_away_is_named_with_what_to_do(
    change: Callable[[dict[str, Any]], object], named: str, tmp_path: Path
):
    with pytest.raises(UserError, match=f"run of another version of the trainer: {named} .* version that made it"):
        RunFolder(claimed(tmp_path, change)).claim(digits())


def test_a_config_json_of_something_else_is_named_as_such(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"lr": 3}')
    with pytest.raises(UserError, match="is no configuration of a run"):
        RunFolder(tmp_path).claim(digits())


def test_a_config_may_be_a_folder_and_a_run_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    (tmp_path / "file").write_text("no run")
    for words in (["sample", "run"], ["--out", "run"], ["--out", "file"], ["digits", "--out", "file/run"]):
        assert main([*words[:-1], str(tmp_path / words[-1])]) == 2
        assert str(tmp_path) in said(capsys)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_nothing_can_be_locked_the_run_goes_on_and_says_so(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object) -> None:
        raise OSError(code, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path).locked():
        pass
    assert "is not locked (not here)" in capsys.readouterr().out


def test_a_locked_folder_is_refused(tmp_path: Path):
    with RunFolder(tmp_path).locked(), pytest.raises(UserError, match="another process"), RunFolder(tmp_path).locked():
        pass


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_a_foreign_file_among_the_checkpoints_is_named_and_passed_over(run: Path, capsys: pytest.CaptureFixture[str]):
    (newest, *_) = RunFolder(run).checkpoints()
    spoilt = newest.parent
    (spoilt / "step_zero.safetensors").write_bytes(pickle.dumps(Evil()))
    (spoilt / "step_folder.safetensors").mkdir()
    save_tensors(spoilt / "step_about.safetensors", {"a": torch.zeros(2)}, {"step": "ten"})
    (spoilt / "step_cut.safetensors").write_bytes(newest.read_bytes()[:-9])
    assert RunFolder(run).latest_checkpoint()[0] == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("falling back to the checkpoint before" in line and str(spoilt) in line for line in lines)


def without_moments(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("exp_avg")]:
        del tensors[name]


def wider(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "/network." in name]:
        tensors[name] = (
            tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1)) if tensors[name].dim() else tensors[name]
        )


def half(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.is_floating_point() else tensor


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["ema/one_more"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(without_moments, ["--out"]), *itertools.product([wider, half, empty, one_more], [["--out"], ["sample"]])],
)
def test_a_checkpoint_of_something_else_gets_one_line(
    words: list[str], spoil, run: Path, capsys: pytest.CaptureFixture[str]
):
    (newest, *_) = RunFolder(run).checkpoints()
    tensors, about = load_tensors(newest)
    spoil(tensors)
    save_tensors(newest, tensors, about)
    capsys.readouterr()
    assert main([*words, str(run), "--device=cpu"]) == 2
    assert "does not fit" in said(capsys)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_what_is_no_run_or_not_trained_yet_is_said(command: str, run: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(run / "checkpoints")
    assert main([command, str(run)]) == 2
    assert "train it first, with the same --out" in said(capsys)
    assert main([command, str(run / "nowhere")]) == 2
    assert "no run at" in said(capsys)
