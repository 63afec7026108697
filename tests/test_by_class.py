"""Training by class: networks that are told, and batches that tell them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference_trainer.config import TrainConfig
from reference_trainer.data.classes import ByClass
from reference_trainer.networks import DiT, UNet
from reference_trainer.training.batches import Batches, batch_indices
from robustcm.couplers import Entropic, WithinClasses, exact, independent
from robustcm.flow_maps import FlowMapObjective
from robustcm.gates import everywhere
from robustcm.objective import Objective, draw
from robustcm.semidiscrete import Semidiscrete
from robustcm.trajectories import TrajectoryObjective

PARTS = (
    DiT(width=16, layers=2, heads=2, patch=4),
    DiT(width=16, heads=2, patch=2),
    UNet(block_out_channels=(8, 8), attention=(False, False), norm_num_groups=4),
)
SHAPE, CLASSES = (3, 4, 4), 5
LABELS = torch.tensor([0, 1, 4, 2, CLASSES, 1])


def inputs(times: int, seed: int = 0) -> tuple[Tensor, ...]:
    """x and so many times; of the first, some samples have the same."""
    generator = torch.Generator().manual_seed(seed)
    c_noise = 5 * torch.randn(times, 6, generator=generator)
    c_noise[0, 1:4] = c_noise[0, 0]
    return torch.randn(6, *SHAPE, generator=generator), *c_noise


# --- Networks ---------------------------------------------------------------------------------------------------------

networks = pytest.mark.parametrize("part", PARTS, ids=["token", "tokens", "unet"])
told = pytest.mark.parametrize("times", [1, 2])


@networks
@told
def test_a_network_told_classes_starts_as_the_one_without(part: DiT | UNet, times: int):
    plain, by_class = part.build(SHAPE, 0, times), part.build(SHAPE, 0, times, CLASSES)
    x = inputs(times)
    torch.testing.assert_close(by_class(*x, labels=LABELS), plain(*x))
    more = sum(p.numel() for p in by_class.parameters()) - sum(p.numel() for p in plain.parameters())
    width = next(p.shape[1] for name, p in by_class.named_parameters() if "labels" in name)
    assert more == (CLASSES + 1) * width


@networks
@told
def test_after_a_step_each_sample_follows_its_own_label_whatever_shares_its_batch(part: DiT | UNet, times: int):
    network, x = stepped(part, times), inputs(times, seed=1)
    out = network(*x, labels=LABELS)
    other = network(*x, labels=(LABELS + 1) % (CLASSES + 1))
    assert ((out - other).flatten(1).abs().amax(1) > 1e-4).all()
    alone = [network(*(part[i : i + 1] for part in x), labels=LABELS[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-4, atol=1e-5)


@networks
@told
def test_without_labels_it_is_told_of_no_class(part: DiT | UNet, times: int):
    network, x = stepped(part, times), inputs(times)
    assert torch.equal(network(*x), network(*x, labels=torch.full((6,), CLASSES)))
    assert not torch.allclose(network(*x), network(*x, labels=torch.zeros(6, dtype=torch.long)))


def stepped(part: DiT | UNet, times: int) -> nn.Module:
    """Behind a step in which every label was seen."""
    network = part.build(SHAPE, 0, times, CLASSES)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    x, target = inputs(times), inputs(1, seed=5)[0]
    (network(*x, labels=torch.arange(6)) - target).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    optimizer.step()
    return network.eval().requires_grad_(False)


@networks
def test_told_two_times_it_still_has_a_derivative_in_each(part: DiT | UNet):
    network, x, along = stepped(part, 2), inputs(2), inputs(2, seed=2)
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda *given: network(*given, labels=LABELS), x, along)
    by = 1e-3
    ends = [network(*(v + sign * by * d for v, d in zip(x, along, strict=True)), labels=LABELS) for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * by), rtol=0.02, atol=0.02)


@networks
def test_a_network_without_classes_takes_no_labels(part: DiT | UNet):
    with pytest.raises(ValueError, match="built without classes"):
        part.build(SHAPE, 0)(*inputs(1), labels=LABELS)


# --- Batches ----------------------------------------------------------------------------------------------------------

LATENTS = 0.5 * torch.randn(40, 2, 3, 3, generator=torch.Generator().manual_seed(0))
BY_CLASS = ByClass()
OF_LATENTS = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))


def config(classes: ByClass | None = BY_CLASS, **changes) -> TrainConfig:
    objective = Objective(**{"coupler": exact, "gate": everywhere} | changes)
    return TrainConfig(objective=objective, classes=classes, batch_size=8, steps=30)


def told_of(asked: TrainConfig, step: int) -> Tensor:
    return Batches(asked, LATENTS, OF_LATENTS, 3)(step).conditions["labels"]


def test_the_network_is_told_the_labels_of_its_samples_some_of_them_hidden():
    whole = [told_of(config(ByClass(dropout=0.0)), step) for step in range(5)]
    assert all(torch.equal(labels, OF_LATENTS[batch_indices(0, s, 40, 8)]) for s, labels in enumerate(whole))
    some = [told_of(config(ByClass(dropout=0.5)), step) for step in range(5)]
    gone = torch.stack(some) == 3
    assert torch.equal(torch.stack(some)[~gone], torch.stack(whole)[~gone])
    assert len(torch.unique(gone, dim=0)) == 5
    assert [labels.tolist() for labels in some] == [
        told_of(config(ByClass(dropout=0.5)), step).tolist() for step in range(5)
    ]
    other = told_of(replace(config(ByClass(dropout=0.5)), seed=1), 2)
    assert not torch.equal(other == 3, gone[2])


def test_hiding_labels_changes_neither_noise_nor_levels_nor_pairing():
    batches = [Batches(config(ByClass(dropout=share)), LATENTS, OF_LATENTS, 3)(4) for share in (0.0, 0.9)]
    for one, two in zip(*(batch[:2] for batch in batches), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(batches[0].pairs.t_hi, batches[1].pairs.t_hi)


@pytest.mark.parametrize("coupler", [exact, Entropic(reg=0.05)])
def test_by_class_a_noise_stays_in_the_class_it_was_drawn_for_unless_asked_otherwise(coupler):
    def stays(asked: TrainConfig) -> bool:
        batches = Batches(asked, LATENTS, OF_LATENTS, 3)
        for step in range(4):
            own, used = draw(0, step, (8, 2, 3, 3)).z.flatten(1), batches(step).z.flatten(1)
            origin, labels = torch.cdist(used, own).argmin(1), OF_LATENTS[batch_indices(0, step, 40, 8)]
            assert torch.equal(used, own[origin])
            if not torch.equal(labels[origin], labels):
                return False
        return True

    assert stays(config(coupler=coupler))
    assert not stays(config(ByClass(coupled_within=False), coupler=coupler))
    assert not stays(config(None, coupler=coupler))


def test_what_is_coupled_already_or_not_at_all_stays_so():
    assert config().coupler == WithinClasses(exact)
    assert config(coupler=WithinClasses(Entropic())).coupler == WithinClasses(Entropic())
    assert config(coupler=independent).coupler is independent
    with pytest.raises(ValueError, match="Semidiscrete pairs noise with images of any class"):
        config(coupler=Semidiscrete(steps=4))


def test_where_the_data_follow_the_noise_so_do_their_labels():
    asked = config(ByClass(dropout=0.0, coupled_within=False), coupler=Semidiscrete(steps=4))
    batches = Batches(asked, LATENTS, OF_LATENTS, 3)
    batch = batches(3)
    index = torch.cdist(batch.x.flatten(1), LATENTS.flatten(1)).argmin(1)
    assert torch.equal(batch.conditions["labels"], OF_LATENTS[index])


def test_without_classes_nothing_is_told():
    assert Batches(config(None), LATENTS, OF_LATENTS)(2).conditions == {}


def test_guidance_without_hidden_labels_is_refused():
    with pytest.raises(ValueError, match=r"guidance=1.5 needs samples without a class to learn from: dropout above 0"):
        ByClass(dropout=0.0, guidance=1.5)


def test_every_method_trains_by_class():
    for objective in (Objective(), FlowMapObjective(), TrajectoryObjective()):
        asked = TrainConfig(objective=objective, classes=ByClass(), batch_size=8, steps=30)
        network = DiT(width=16, layers=1, heads=2, patch=3).build((2, 3, 3), 0, objective.num_times, 3)
        terms = objective(asked.preconditioned(network), Batches(asked, LATENTS, OF_LATENTS, 3)(1), objective.init())
        terms.loss.backward()
        assert network.network.adaln_single.labels.weight.grad.abs().sum() > 0
