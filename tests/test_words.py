"""Words of a command line: a preset of data, a recipe, in any order; and data sets that want a store."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reference_trainer.__main__ import main, parser
from reference_trainer.ablation.ablate import base_of
from reference_trainer.ablation.ladder import ARMS, arm_from_words
from reference_trainer.commands.train import configuration
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError
from reference_trainer.options import override
from reference_trainer.presets import DATA, PRESETS, RECIPES, digits, ilct, on_data, paper
from reference_trainer.published import DATA_SETS, celebahq, imagenet, lsun_church
from reference_trainer.run import RunFolder
from reference_trainer.words import NAMES, Chosen

TINY = ["network=UNet(block_out_channels=(8,), attention=(False,), norm_num_groups=4)", "batch_size=4", "steps=2"]


def configured(words: list[str]) -> TrainConfig:
    return configuration(parser().parse_args(["train", *words]))[1]


@pytest.fixture
def extraction(tmp_path: Path) -> Path:
    """A store as LightningDiT leaves it, of 500 latents: 450 to train on, 50 held out."""
    folder = tmp_path / "latents"
    folder.mkdir()
    latents = torch.randn(500, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    tensors = {"latents": latents, "latents_flip": latents.flip(3), "labels": torch.zeros(500, dtype=torch.long)}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    return folder


@pytest.fixture
def store(image_folder: Path, tmp_path: Path) -> Path:
    """40 images as their own latents."""
    encoding = Encoding(source=ImageFolder(path=str(image_folder), resolution=16), autoencoder=PixelSpace())
    encode_folder(encoding, tmp_path / "store", torch.device("cpu"), tmp_path / "cache")
    return tmp_path / "store"


# --- What the words mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_one_word_means_what_it_meant(preset):
    assert Chosen.of([preset.__name__]).configured() == preset()
    assert Chosen.of([]).configured() == digits() == TrainConfig()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_recipe_alone_is_on_the_digits(recipe):
    assert configured([recipe.__name__]) == configured(["digits", recipe.__name__]) == recipe(digits())


@given(st.sampled_from(DATA), st.sampled_from(RECIPES), st.booleans())
def test_data_and_recipe_combine_in_any_order(data, recipe, swapped: bool):
    names = [data.__name__, recipe.__name__]
    chosen = Chosen.of(names[::-1] if swapped else names)
    assert chosen.configured() == recipe(data())
    assert chosen.name == "-".join(names)


@pytest.mark.parametrize("kind", [DATA, RECIPES])
def test_two_of_one_kind_are_refused_by_name(kind):
    for one, two in itertools.permutations([preset.__name__ for preset in kind], 2):
        with pytest.raises(UserError, match=f"^{one} and {two} are 2 presets of one kind"):
            Chosen.of([one, two])


def test_one_word_twice_is_two():
    with pytest.raises(UserError, match="ilct and ilct are 2 presets"):
        Chosen.of(["ilct", "ilct"])


# --- Data sets that want a store --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", DATA_SETS, ids=lambda preset: preset.__name__)
def test_without_a_store_one_line_gives_the_two_commands(preset, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for words in ([preset.__name__, "paper"], [preset.__name__, "paper", f"--data={tmp_path}"]):
        assert main(["train", *words]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        encode, train = (shlex.split(command)[3:] for command in re.findall("`(.*?)`", said))
        encoding, training = (parser().parse_args(command) for command in (encode, ["train", *train]))
        assert (encoding.run_command.__name__, encoding.resolution) == ("run_encode", 256)
        assert encoding.flips == preset().data.flips
        assert training.words == [preset.__name__, "paper"]
        assert training.data == encoding.out
    assert not list(tmp_path.iterdir())


def test_a_configuration_without_its_store_can_be_shown_but_not_opened():
    assert configured(["lsun_church", "--show"]) == lsun_church()
    with pytest.raises(UserError, match="none is named"):
        lsun_church().load_images(torch.device("cpu"))


def test_the_steps_follow_from_the_images_in_the_store(extraction: Path):
    there = replace(celebahq(450), data=LatentStore(path=str(extraction)))
    assert configured(["celebahq", f"--data={extraction}"]) == there
    assert there.steps == 1400 * (450 // 128)
    assert configured(["paper", "celebahq", f"--data={extraction}"]) == paper(there)
    assert configured(["lsun_church", f"--data={extraction}"]).steps == 1800 * (900 // 256)
    assert configured(["imagenet", f"--data={extraction}"]).steps == imagenet(450).steps


def test_another_batch_size_keeps_the_epochs_unless_steps_are_given(extraction: Path):
    words = ["celebahq", f"--data={extraction}"]
    steps = configured(words).steps
    assert configured([*words, "batch_size=64"]).steps == 2 * steps
    assert configured([*words, "batch_size=64", "steps=7"]).steps == 7
    assert configured(["batch_size=64"]).steps == digits().steps  # the digits' are no epochs


def test_a_run_of_a_data_set_trains_and_goes_by_its_words(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["ilct", "celebahq", f"--data={store}", *TINY, "--brief", "--device=cpu"]) == 0
    run = RunFolder(Path("runs/celebahq-ilct-store"))
    expected = replace(ilct(celebahq(36)), data=LatentStore(path=str(store)), autoencoder=PixelSpace())
    for option in TINY:
        expected = override(expected, option)
    assert run.config() == expected
    assert run.latest_checkpoint()[0] == 2


# --- ablate -----------------------------------------------------------------------------------------------------------


def test_the_ladder_stands_on_any_data(extraction: Path):
    base, changes = base_of(["celebahq", "ema_decay=0.9"], extraction)
    assert (base, changes) == (configured(["celebahq", f"--data={extraction}"]), ["ema_decay=0.9"])
    for arm in ARMS:
        config = arm.build(base)
        assert (config.data, config.network, config.batch_size) == (base.data, base.network, base.batch_size)
    assert base_of([], None) == (digits(), [])


def test_an_arm_typed_by_hand_stands_on_the_base_or_on_data_of_its_own(extraction: Path):
    base, _ = base_of(["celebahq"], extraction)
    assert arm_from_words(["paper", "ema_decay=0.9"], extraction).build(base) == replace(paper(base), ema_decay=0.9)
    own = arm_from_words(["imagenet", "ilct"], extraction).build(base)
    assert own == on_data(ilct(imagenet(450)), extraction)
    assert arm_from_words(["digits"]).build(base) == digits()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["celebahq"], "celebahq needs latents"),
        (["digits", "pixels"], "digits and pixels are 2 presets"),
        (["paper"], "paper is a recipe, as the arms are: give --arm paper"),
        (["--arm", "ffhq", "paper"], "ffhq paper needs latents"),
        (["--arm", "ffhq", "papper"], "unknown preset papper"),
        (["--arm", "ilct", "paper"], "ilct and paper are 2 presets"),
    ],
)
def test_ablate_says_what_is_wrong_before_it_trains(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main(["ablate", *words, f"--out={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_name_is_there_once():
    assert len(set(NAMES)) == len(NAMES) == len(DATA) + len(RECIPES)


# --- Options in any order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", list(itertools.permutations(["micro_batches=3", "batch_size=300", "steps=7"])))
def test_options_that_only_fit_together_are_taken_in_any_order(words: tuple[str, ...]):
    found = configured(list(words))
    assert (found.micro_batches, found.batch_size, found.steps) == (3, 300, 7)


def test_what_waits_does_not_overtake_what_is_of_its_own_path():
    """Of a value given twice the last counts, of a part and its field the one behind changes the one before."""
    assert configured(["micro_batches=3", "micro_batches=5", "batch_size=300"]).micro_batches == 5
    waits, field = "network=FromDiffusers(name='x', patch=0)", "network.patch=2"
    with pytest.raises(UserError, match=r"option network=FromDiffusers.*patch must be a whole number"):
        configured([waits, field])


def test_options_that_fit_in_no_order_are_refused_with_what_is_wrong_of_the_first():
    with pytest.raises(UserError, match="micro_batches must divide batch_size = 256, got 3"):
        configured(["micro_batches=3", "steps=7", "batch_size=0"])
