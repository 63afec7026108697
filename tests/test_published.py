"""The published data sets: networks counted against their papers, settings against what the help says of them."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from reference_trainer import published
from reference_trainer.data.stored import LatentStore
from reference_trainer.model import build_network
from reference_trainer.networks import DiT
from reference_trainer.options import override
from reference_trainer.presets import RECIPES, ilct, on_data, paper
from reference_trainer.published import DATA_SETS, DIT_B2, DIT_L2, DIT_S2, NETWORKS, celebahq, ffhq, lsun_church
from robustcm.gates import AboveExplained
from robustcm.norms import NonScalingLayerNorm
from robustcm.objective import Objective, draw
from robustcm.schedules import DoublingCurriculum

SHAPE = (4, 32, 32)
COUNTS = {"ADM": 151_325_956, "DIT_S2": 22_449_808, "DIT_B2": 89_431_312, "DIT_L2": 310_004_752}


def count_of(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_as_many_parameters_as_its_docstring_says(name: str):
    with torch.device("meta"):
        network = NETWORKS[name].build(SHAPE, seed=0)
    assert count_of(network) == COUNTS[name]
    assert f"{COUNTS[name]:,} parameters" in Path(published.__file__).read_text()


def dhariwal_unet(ch: int, mult: tuple[int, ...], blocks: int, attention: tuple[int, ...], side: int, io: int) -> int:
    """Parameters of EDM's DhariwalUNet, counted from its list of layers."""
    emb, norm = 4 * ch, 2

    def conv(i: int, o: int, kernel: int) -> int:
        return i * o * kernel**2 + o

    def block(i: int, o: int, attends: bool) -> int:
        shortcut = conv(i, o, 1) if i != o else 0
        attention = norm * o + conv(o, 3 * o, 1) + conv(o, o, 1) if attends else 0
        return norm * i + conv(i, o, 3) + conv(emb, 2 * o, 1) + norm * o + conv(o, o, 3) + shortcut + attention

    total, width, skips = conv(ch, emb, 1) + conv(emb, emb, 1) + conv(io, ch, 3), ch, []
    for level, times in enumerate(mult):
        total += block(width, width, False) if level else 0
        skips.append(width)
        for _ in range(blocks):
            total += block(width, ch * times, side >> level in attention)
            width = ch * times
            skips.append(width)
    total += block(width, width, True)
    for level, times in reversed(list(enumerate(mult))):
        total += block(width, width, False)  # the second of the middle, or what doubles height and width
        for _ in range(blocks + 1):
            total += block(width + skips.pop(), ch * times, side >> level in attention)
            width = ch * times
    return total + norm * width + conv(width, io, 3)


def test_the_unet_is_the_one_of_adm_to_the_last_parameter():
    assert COUNTS["ADM"] == dhariwal_unet(128, (1, 2, 3, 4), blocks=4, attention=(16, 8), side=32, io=4)


@pytest.mark.parametrize(
    ("part", "name", "million"), [(DIT_S2, "DIT_S2", 33), (DIT_B2, "DIT_B2", 130), (DIT_L2, "DIT_L2", 458)]
)
def test_a_transformer_lacks_of_the_published_one_what_its_docstring_says(part: DiT, name: str, million: int):
    w, layers, patch = part.width, part.layers, 4 * part.patch**2
    tokens, time = patch * w + w, 256 * w + w + w**2 + w
    inside = 4 * (w**2 + w) + 8 * w**2 + 5 * w
    modulation = 6 * w**2 + 6 * w
    labels, last = 1001 * w, 2 * w**2 + 2 * w  # positions are fixed, and no parameters
    whole = tokens + time + labels + layers * (inside + modulation) + last + 2 * (patch * w + patch)
    assert round(whole / 1e6) == million
    # One modulation for all blocks, and tables [6, w] a block and [2, w] at the end for what is each one's own.
    shared = modulation + layers * 6 * w + 2 * w
    assert COUNTS[name] == whole - layers * modulation - last + shared - labels - (patch * w + patch)


@pytest.mark.parametrize("name", ["ADM", "DIT_S2", "DIT_B2"])
def test_a_network_takes_a_step_at_batch_1(name: str):
    """On latents of a smaller side, where the same weights have less to do; the paper's recipe, norms and all."""
    shape = (4, 8, 8) if name == "ADM" else (4, 4, 4)
    config = replace(paper(celebahq()), network=NETWORKS[name])
    assert isinstance(config.objective, Objective)
    network = build_network(config, shape)
    assert any(isinstance(module, NonScalingLayerNorm) for module in network.modules())
    x = 0.5 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    batch = config.objective.prepare(x, draw(0, 0, x.shape), 0, config.steps)
    terms = config.objective(config.preconditioned(network), batch, config.objective.init())
    terms.loss.backward()
    watched = [next(network.parameters()), list(network.parameters())[-1]]
    before = [parameter.detach().clone() for parameter in watched]
    optimizer = config.optimizer.build(list(network.parameters()), network)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate(0, config.steps)
    optimizer.step()
    assert terms.loss.isfinite()
    for old, new in zip(before, watched, strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_the_largest_goes_there_and_back_without_memory():
    """DiT-L/2, whose 310 M weights take too long here: shapes alone."""
    with torch.device("meta"):
        network = DIT_L2.build(SHAPE, seed=0)
        output = network(torch.empty(1, *SHAPE), torch.empty(1))
        output.sum().backward()
    assert output.shape == (1, *SHAPE)
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_chosen_by_its_name(name: str):
    assert override(ilct(celebahq()), f"network={name}") == replace(ilct(celebahq()), network=NETWORKS[name])


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", DATA_SETS, ids=lambda preset: preset.__name__)
def test_a_data_set_is_what_its_first_line_says(preset):
    config, line = preset(), preset.__doc__.splitlines()[0]
    found = re.search(r"([\d,.]+) M; batch (\d+), lr (\S+), EMA ([\d.]+), ([\d,]+) epochs = ([\d,]+) steps", line)
    assert found is not None
    million, batch, lr, ema, epochs, steps = (float(text.replace(",", "")) for text in found.groups())
    (count,) = (COUNTS[name] for name, network in NETWORKS.items() if network == config.network)
    assert round(count / 1e6) == million
    assert (config.batch_size, config.learning_rate.lr, config.ema_decay) == (batch, lr, ema)
    assert config.steps == steps
    assert config.steps % epochs == 0


def test_epochs_and_batches_are_those_of_the_papers_table():
    assert celebahq(12_800).steps == 1400 * 100
    assert ffhq(12_800).steps == 1400 * 100
    assert lsun_church(12_800).steps == 1800 * 100  # an epoch passes over the mirrored images, too
    assert celebahq(12_800 + 127).steps == 1400 * 100  # a last batch cut short is none
    assert celebahq(5).steps == 1400


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("preset", DATA_SETS, ids=lambda preset: preset.__name__)
def test_a_recipe_changes_technique_alone(preset, recipe):
    ours, other = preset(), recipe(preset())
    different = {field.name for field in fields(ours) if getattr(ours, field.name) != getattr(other, field.name)}
    assert "objective" in different
    assert different <= {"objective", "clip", "non_scaling_norm"}
    if isinstance(other.objective, Objective):
        assert other.objective.levels == ours.objective.levels


@pytest.mark.parametrize("preset", DATA_SETS, ids=lambda preset: preset.__name__)
def test_ours_is_the_recipe_of_the_digits_with_the_papers_curriculum(preset):
    objective = preset().objective
    curriculum = objective.levels.curriculum
    assert isinstance(curriculum, DoublingCurriculum)
    assert (curriculum.s0, curriculum.s1) == ((8, 512) if preset is published.imagenet else (10, 640))
    assert isinstance(objective.gate, AboveExplained)


def test_data_changes_no_setting_of_a_data_set(tmp_path: Path):
    config = paper(lsun_church())
    assert on_data(config, tmp_path) == replace(config, data=LatentStore(path=str(tmp_path), flips=True))
