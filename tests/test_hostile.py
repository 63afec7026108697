"""Files that are whole and hold nonsense, and a draw of benchmarks/faults/fuzz.py: one line, nothing run or changed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from reference_trainer.__main__ import main
from reference_trainer.data.autoencoders import PixelSpace, PretrainedAutoencoder, require_elsewhere
from reference_trainer.data.index import CODEC, INDEX, Index
from reference_trainer.data.origin import KeptSpace
from reference_trainer.data.shards import about_shard
from reference_trainer.data.store import Store
from reference_trainer.data.stored import autoencoder_from_dict, load_codec
from reference_trainer.errors import UserError
from reference_trainer.files import as_json, load_tensors, save_tensors
from reference_trainer.options import to_json
from reference_trainer.presets import digits
from reference_trainer.run import RunFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))

import fuzz
from hostile import Case, Good, make_good
from spoilt import Evil, leaves

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    patch = pytest.MonkeyPatch()
    patch.setenv("ROBUSTCM_CACHE", str(tmp_path_factory.mktemp("cache")))
    made = make_good(tmp_path_factory.mktemp("fuzz") / "good", lambda words: fuzz.run(words, seconds=0))
    patch.undo()
    return made


def refused(work: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        work()
    assert "\n" not in str(caught.value)


# --- Checksums that fit, contents that do not ------------------------------------------------------------------------


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_anywhere_in_a_file_changes_what_is_read(where: float, bit: int, tmp_path_factory):
    file = tmp_path_factory.mktemp("bits") / "x.safetensors"
    save_tensors(file, {"weights": torch.ones(8)}, {"step": 1234567890})
    damaged = bytearray(file.read_bytes())
    damaged[int(where * len(damaged))] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        tensors, about = load_tensors(file)
    except UserError:
        return
    assert about == {"step": 1234567890}
    assert torch.equal(tensors["weights"], torch.ones(8))


def test_a_file_of_an_earlier_version_has_a_checksum_of_its_tensors_alone(tmp_path: Path):
    save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {"step": 1})
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        about = {name: text for name, text in opened.metadata().items() if name != "about_crc32"}
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", about)
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"step": 1}


@pytest.mark.parametrize("about", [[], 7, None, "x"])
def test_what_a_file_says_of_itself_is_a_mapping(about: Any, tmp_path: Path):
    save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, about)
    refused(lambda: load_tensors(tmp_path / "x.safetensors"), "whole, but not what this trainer writes there")


def rewritten(file: Path, change: Callable[[Tensors, dict[str, Any]], object], to: Path) -> Path:
    tensors, about = load_tensors(file)
    change(tensors, about)
    save_tensors(to, tensors, about)
    return to


SPACES = {
    "no mean": lambda tensors, _: tensors.pop("mean"),
    "no shape": lambda _, about: about.pop("shape"),
    "a shape of two": lambda _, about: about.update(shape=[3, 16]),
    "a shape of fractions": lambda _, about: about.update(shape=[3, 16.5, 16]),
    "no channels": lambda _, about: about.pop("image_channels"),
    "a std of another shape": lambda tensors, _: tensors.update(std=torch.ones(4)),
    "a std of 0": lambda tensors, _: tensors["std"].zero_(),
    "a mean that is NaN": lambda tensors, _: tensors["mean"].fill_(torch.nan),
    "a level in words": lambda _, about: about.update(recognised_at="high"),
    "another field of its origin": lambda _, about: about["origin"].update(colour=1),
    "an origin without size": lambda _, about: about["origin"].pop("size"),
    "an origin that is a list": lambda _, about: about.update(origin=[]),
}


@pytest.mark.parametrize("change", SPACES.values(), ids=list(SPACES))
def test_a_latent_space_of_nonsense_is_refused(change, good: Good, tmp_path: Path):
    file = rewritten(good.run / "autoencoder.safetensors", change, tmp_path / "autoencoder.safetensors")
    refused(lambda: KeptSpace.load(file, PixelSpace(), CPU), "put a copy back, or train anew")


CODECS = {
    "no probe": lambda tensors, _: tensors.pop("probe/latents"),
    "no recipe": lambda _, about: about.pop("recipe"),
    "no channels": lambda _, about: about.pop("image_channels"),
    "notes that are none": lambda _, about: about.update(notes=7),
}


@pytest.mark.parametrize("change", CODECS.values(), ids=list(CODECS))
def test_a_codec_of_nonsense_is_refused(change, good: Good, tmp_path: Path):
    rewritten(good.store / CODEC, change, tmp_path / CODEC)
    refused(lambda: load_codec(tmp_path, PixelSpace(), CPU), "whole, but not what this trainer writes there")


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None])
def test_a_step_of_nonsense_is_no_checkpoint(step: Any, tmp_path: Path):
    save_tensors(tmp_path / "checkpoints" / "step_00000001.safetensors", {"x": torch.ones(2)}, {"step": step})
    refused(lambda: RunFolder(tmp_path).latest_checkpoint(), "no checkpoint in .* can be read")


INDICES = {
    "a shape below 0": {"shape": [3, -16, 16]},
    "counts below 0": {"shards": [{"name": "x.safetensors", "count": -1, "sha256": ""}]},
    "a shard elsewhere": {"shards": [{"name": "../x.safetensors", "count": 1, "sha256": ""}]},
    "a shard without a name": {"shards": [{"name": 7, "count": 1, "sha256": ""}]},
    "endless shards": {"shards": [{"name": "x", "count": float("inf"), "sha256": ""}]},
    "fewer names than classes": {"label_names": ["a"]},
    "classes below 0": {"classes": -1},
    "more classes than there are": {"classes": 2**62, "label_names": None},
    "moments in a list": {"moments": [1]},
    "moments of other channels": {"moments": {"latents": {"count": 1, "mean": [0.0], "squares": [1.0]}}},
    "moments that are NaN": {"moments": {"latents": {"count": 1, "mean": [float("nan")] * 3, "squares": [1.0] * 3}}},
    "squares below 0": {"moments": {"latents": {"count": 1, "mean": [0.0] * 3, "squares": [-1.0] * 3}}},
    "an autoencoder in words": {"autoencoder": "KLAutoencoder"},
    "statistics in a list": {"statistics": [1]},
}


@pytest.mark.parametrize("change", INDICES.values(), ids=list(INDICES))
def test_an_index_of_nonsense_is_refused(change: dict[str, Any], good: Good, tmp_path: Path):
    index = json.loads((good.store / INDEX).read_text()) | change
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(lambda: Index.read(tmp_path), "is no index of latents")


def test_an_index_as_encode_writes_it_is_read(good: Good):
    assert Index.read(good.store).classes == 2


@pytest.mark.parametrize("found", [[], {"part": []}, {"part": "PixelSpace", "x": 1}, {"part": "os:system"}, {}])
def test_an_autoencoder_of_nonsense_is_refused(found: Any):
    refused(lambda: autoencoder_from_dict(found), "names an autoencoder that this version does not have")


@pytest.mark.parametrize("said", ["{", "[1]", "7"])
def test_a_shard_that_says_nonsense_of_itself_is_refused(said: str, tmp_path: Path):
    save_file({"latents": torch.zeros(1, 1, 1, 1)}, tmp_path / "x.safetensors", {"robustcm latents": said})
    refused(lambda: about_shard(tmp_path / "x.safetensors"), "whole, but not what this trainer writes there")


@pytest.mark.parametrize("count", [11, 23])
def test_labels_are_one_a_latent_whatever_the_index_says(count: int, good: Good, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("reference_trainer.data.store.read_labels", lambda _: torch.zeros(count, dtype=torch.long))
    refused(lambda: Store.open(good.store).labels, f"has {2 * count} labels of 24 latents")


def test_a_checkpoint_beyond_the_last_step_is_of_another_run(good: Good, tmp_path: Path):
    run = shutil.copytree(good.run, tmp_path / "run")
    (file,) = (run / "checkpoints").iterdir()
    rewritten(file, lambda _, about: about.update(step=99), file)
    status, said = fuzz.run(["train", f"--out={run}", "--device=cpu"])
    assert status == 2
    assert said.splitlines()[-1] == f"error: {run} has a checkpoint of step 99 of 1: it is of another run"


# --- A draw, and who judges it ---------------------------------------------------------------------------------------


def test_a_draw_of_hostile_inputs_is_refused_line_by_line(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--n", "21", "--seed", "3", "--keep", str(tmp_path / "kept")])
    assert fuzz.main() == 0, capsys.readouterr().err
    cases, one_line, status, executed, overwritten, _ = capsys.readouterr().out.splitlines()[-1].split()[1:]
    assert (cases, one_line, status, executed, overwritten) == ("21", "21", "21", "0", "0")


def test_the_judge_sees_each_fault(good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def row_of(command: Callable[[list[str]], int]) -> Counter[str]:
        monkeypatch.setattr(fuzz, "command_line", command)
        row, _ = fuzz.judged(Case("", []), good, tmp_path)
        assert fuzz.at_fault(row)
        return row

    def says(text: str, status: int = 2, work: Callable[[], object] = lambda: None) -> Callable[[list[str]], int]:
        return lambda _: (work(), print(text), status)[-1]

    victim = tmp_path / "victim"
    victim.write_text("before")
    evil = Evil(good.witness).__reduce__()
    assert not row_of(says("error: one line", status=0))["status 2"]
    assert not row_of(says("error: unexpected", status=1))["status 2"]
    assert not row_of(says("error: one line\nerror: and another"))["one line"]
    assert not row_of(says("error: a colour \x1b[31m"))["one line"]
    assert not row_of(says("Traceback\nerror: one line"))["one line"]
    assert row_of(says("error: one line", work=lambda: evil[0](*evil[1]).close()))["executed"]
    assert row_of(says("error: one line", work=lambda: victim.write_text("after")))["overwritten"]
    assert row_of(says("error: one line", work=victim.unlink))["overwritten"]
    monkeypatch.setattr(fuzz, "command_line", says("error: one line"))
    assert not fuzz.at_fault(fuzz.judged(Case("", []), good, tmp_path)[0])


def test_what_ends_well_is_harmless_if_it_wrote_into_its_own_copy_alone(
    good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own, others = tmp_path / "victim", good.run / "config.json"
    own.write_text("before")
    before = others.read_bytes()

    def judged(file: Path) -> Counter[str]:
        monkeypatch.setattr(fuzz, "command_line", lambda _: file.write_text("after") - len("after"))
        return fuzz.judged(Case("", [], must_fail=False), good, tmp_path)[0]

    assert judged(own) == Counter(harmless=1)
    row = judged(others)
    others.write_bytes(before)
    assert row["overwritten"]
    assert fuzz.at_fault(row)


def test_values_that_name_code_leave_the_file_that_the_judge_looks_for_where_they_are_run(good: Good):
    values = leaves(good.witness)
    (call,) = [value for value in values if isinstance(value, dict) and value.get("part") == "os:system"]
    (expression,) = [value for value in values if isinstance(value, str) and value.startswith("__import__")]
    for run in (lambda: os.system(**{name: text for name, text in call.items() if name != "part"}), expression):
        assert (eval(run) if isinstance(run, str) else run()) == 0
        assert good.witness.exists()
        good.witness.unlink()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have_is_a_mistake_in_the_words(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([f"--data={name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no path" in line
    assert len(line) < 200


@pytest.mark.parametrize(
    ("load", "code", "data", "refused"),
    [
        ("downloaded.vae:load", "downloaded/vae.py", "downloaded", True),  # a package without __init__.py
        ("vae:load", "downloaded/vae.py", "downloaded", True),  # by somebody who works in that folder
        ("downloaded.vae:load", "downloaded/vae.py", "downloaded/store", True),
        ("my_vae:load", "my_vae.py", "downloaded", False),
        ("nowhere_to_be_found:load", "my_vae.py", "downloaded", False),  # importing it says so
        ("torch:zeros", "my_vae.py", "downloaded", False),
    ],
)
def test_code_that_comes_with_data_is_not_imported(
    load: str, code: str, data: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / code).parent.mkdir(exist_ok=True)
    (tmp_path / code).write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path / "downloaded" if load.startswith("vae") else tmp_path)
    asked = PretrainedAutoencoder(load=load)
    if not refused:
        require_elsewhere(asked, tmp_path / data)
        return
    with pytest.raises(UserError, match="whose code lies in that folder or in a package around it"):
        require_elsewhere(asked, tmp_path / data)
    run = RunFolder(tmp_path / data)
    with pytest.raises(UserError, match="whose code lies in that folder"):
        run.claim(replace(digits(), autoencoder=asked))
    run.root.mkdir(exist_ok=True)
    (run.root / "config.json").write_text(as_json(to_json(replace(digits(), autoencoder=asked))))
    with pytest.raises(UserError, match="whose code lies in that folder"):
        run.config()
    with pytest.raises(UserError, match="whose code lies in that folder"):
        load_codec(tmp_path / data, asked, torch.device("cpu"))
