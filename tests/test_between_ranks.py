"""Samples that come block by block are those that come at once, and a block that fails costs its set, not the turns."""

from __future__ import annotations

import pytest
import torch

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.classes import ByClass, Classes
from reference_trainer.data.images import to_unit
from reference_trainer.data.latents import LatentSpace
from reference_trainer.evaluation import between_ranks, sets
from reference_trainer.evaluation.between_ranks import samples_between
from reference_trainer.evaluation.rows import Missing
from reference_trainer.evaluation.sets import SAMPLES, Drawn, further_samples, samplers
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.model import TrainedModel, build_network
from reference_trainer.networks import DiT
from reference_trainer.ranks import Ranks

CPU, SHAPE, N = torch.device("cpu"), (1, 4, 4), 1100


class Raw:
    """Features: the pixels."""

    name = "raw"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().flatten(1)


def a_model(by_class: bool) -> TrainedModel:
    config = TrainConfig(
        autoencoder=PixelSpace(),
        clip=None,
        network=DiT(width=8, layers=1, heads=2),
        classes=ByClass() if by_class else None,
    )
    pixels = torch.randint(0, 256, (40, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    space = LatentSpace.of(PixelSpace().build(1, {}), to_unit(pixels))
    classes = Classes(("a", "b"), (30, 10), "") if by_class else None
    network = build_network(config, SHAPE, 2 if by_class else 0).eval().requires_grad_(False)
    return TrainedModel(config, network, space, SHAPE, 1, CPU, classes=classes)


@pytest.mark.parametrize("by_class", [False, True])
def test_blocks_have_the_digits_of_a_set_drawn_at_once(by_class: bool, monkeypatch: pytest.MonkeyPatch):
    for module in (sets, between_ranks):
        monkeypatch.setattr(module, "MAX_IMAGES", 500)  # behind so many none are kept
    model = a_model(by_class)
    blocks = samples_between(model, Raw(), N, 3, Ranks())
    at_once = Drawn.of(model, Raw(), samplers(model, 500, 3), further_samples(model, N, 3))
    assert blocks is not None
    for name in SAMPLES:
        ours, theirs = blocks.vectors[name], at_once.vectors[name]
        assert isinstance(ours, Statistics)
        assert isinstance(theirs, Statistics)
        assert ours.count == theirs.count == N
        for key, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[key], tensor)
        assert torch.equal(blocks.latents[name], at_once.latents[name])


def test_a_block_that_fails_costs_the_features_of_its_set_and_no_turn():
    calls = list[int]()

    class SecondFails(Raw):
        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            calls.append(len(pixels))
            return super().__call__(pixels) * (torch.nan if len(calls) == 2 else 1)

    drawn = samples_between(a_model(False), SecondFails(), N, 0, Ranks())
    assert drawn is not None
    assert calls == [500, 500, 100] * 2
    assert isinstance(drawn.vectors[SAMPLES[0]], Missing)
    assert isinstance(drawn.vectors[SAMPLES[1]], Statistics)
    assert [len(drawn.latents[name]) for name in SAMPLES] == [N, N]


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_where_they_are_stopped_nothing_is_drawn(rounds: int):
    turns = iter(range(100))
    assert samples_between(a_model(False), Raw(), N, 0, Ranks(), lambda: next(turns) >= rounds) is None
