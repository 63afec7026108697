"""The batch of a step is a function of the step; a pool pairs the noise of several batches, each noise used once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder, PixelSpace
from reference_trainer.data.images import ImageFolder, ImageSet
from reference_trainer.errors import UserError
from reference_trainer.networks import DiT
from reference_trainer.run import RunFolder
from reference_trainer.training import batches as batches_module
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches, batch_indices, with_measured_gate, with_measured_parts
from robustcm.couplers import Coupler, Entropic, WithinClasses, coupling_gain, exact, independent
from robustcm.gates import Above, AboveExplained, everywhere
from robustcm.objective import Objective, draw
from robustcm.semidiscrete import Semidiscrete
from robustcm.teacher_input import CovarianceKept, KeepCovariance

LATENTS = 0.5 * torch.randn(40, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def config(pool: int, above: float = 0.0) -> TrainConfig:
    objective = Objective(coupler=exact, gate=Above(above))
    return TrainConfig(objective=objective, coupling_pool=pool, batch_size=8, steps=30)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 3), (10, 10), (7, 4)])
def test_every_sample_is_seen_once_an_epoch(num_samples: int, batch_size: int):
    stream = torch.cat([batch_indices(0, step, num_samples, batch_size) for step in range(num_samples * 3)])
    epochs = stream[: num_samples * 3].reshape(3, num_samples)
    assert torch.equal(epochs.sort(1).values, torch.arange(num_samples).expand(3, -1))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_is_a_function_of_its_step_whatever_was_asked_before():
    forwards = Batches(config(3), LATENTS)
    expected = [forwards(step) for step in range(9)]
    backwards = Batches(config(3), LATENTS)
    for step in reversed(range(9)):
        batch = backwards(step)
        assert torch.equal(batch.x, expected[step].x)
        assert torch.equal(batch.z, expected[step].z)
        assert torch.equal(batch.pairs.t_hi, expected[step].pairs.t_hi)


def test_a_pool_uses_each_noise_of_its_steps_once_and_is_the_cheapest_such_pairing():
    batches = Batches(config(3), LATENTS)
    x = torch.cat([batches(step).x for step in (3, 4, 5)])
    z = torch.cat([batches(step).z for step in (3, 4, 5)])
    drawn = torch.cat([draw(0, step, (8, 2, 3, 3)).z for step in (3, 4, 5)])
    assert torch.equal(z, drawn[exact(x, drawn)])
    assert len(torch.unique(z.flatten(1), dim=0)) == 24


def test_a_pool_of_one_is_the_objectives_own_coupling():
    batch, objective = Batches(config(1), LATENTS)(7), config(1).objective
    alone = objective.prepare(batch.x, draw(0, 7, batch.x.shape), 7, 30)
    assert torch.equal(batch.z, alone.z)


def test_a_larger_pool_gains_more():
    latents = 0.5 * torch.randn(400, 2, 3, 3, generator=torch.Generator().manual_seed(1))

    def gain(pool: int) -> float:
        batches = Batches(config(pool), latents)
        x, z = (torch.cat(parts) for parts in zip(*(batches(step)[:2] for step in range(16)), strict=True))
        return float(coupling_gain(x, z, torch.arange(len(x))))

    assert gain(16) > 1.1 * gain(4) > 1.1 * 1.1 * gain(1) > 0


def test_below_the_gate_every_sample_keeps_its_own_noise():
    batch = Batches(config(3, above=1.0), LATENTS)(4)
    own, above = draw(0, 4, batch.x.shape).z, batch.pairs.t_hi > 1.0
    assert 0 < above.sum() < len(above)
    assert torch.equal(batch.z[~above], own[~above])
    assert not torch.equal(batch.z[above], own[above])


LABELS = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))


def within(pool: int, coupler=exact) -> TrainConfig:
    asked = config(pool)
    return replace(asked, objective=replace(asked.objective, coupler=WithinClasses(coupler)))


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("coupler", [exact, Entropic(reg=0.05)])
def test_within_classes_a_noise_goes_to_a_sample_of_the_class_it_was_drawn_for(pool: int, coupler):
    """Whichever batch of the pool that sample is in; and every noise is used once."""
    batches = Batches(within(pool, coupler), LATENTS, LABELS)
    steps = range(pool, 2 * pool)
    drawn = torch.cat([draw(0, step, (8, 2, 3, 3)).z for step in steps]).flatten(1)
    used = torch.cat([batches(step).z for step in steps]).flatten(1)
    origin = torch.cdist(used, drawn).argmin(1)
    assert torch.equal(used, drawn[origin])
    assert torch.equal(origin.sort().values, torch.arange(8 * pool))
    assert not torch.equal(origin, torch.arange(8 * pool))
    labels = LABELS[torch.cat([batch_indices(0, step, 40, 8) for step in steps])]
    assert torch.equal(labels[origin], labels)


def test_a_class_of_one_sample_keeps_its_noise():
    batches = Batches(within(1, Entropic()), LATENTS, torch.arange(40))
    assert torch.equal(batches(2).z, draw(0, 2, (8, 2, 3, 3)).z)


def test_labels_change_nothing_for_couplers_that_ask_for_none():
    for coupler in (exact, Entropic(reg=0.05), independent):
        asked = replace(config(2), objective=replace(config(2).objective, coupler=coupler))
        assert torch.equal(Batches(asked, LATENTS, LABELS)(3).z, Batches(asked, LATENTS)(3).z)


def test_within_classes_is_refused_by_name_where_the_data_have_no_labels():
    asked = replace(within(1, Entropic()), data=ImageFolder(path="photos"))
    with pytest.raises(UserError, match=r"WithinClasses .* images of ImageFolder have no labels: take exact"):
        Batches(asked, LATENTS)


def test_it_is_refused_before_the_autoencoder_is_fitted(tmp_path, monkeypatch):
    images = ImageSet("photos", torch.zeros(40, 3, 8, 8, dtype=torch.uint8), None, torch.arange(40) % 10 == 9)
    monkeypatch.setattr(KLAutoencoder, "fit", lambda *_: pytest.fail("fitted"))
    with pytest.raises(UserError, match="WithinClasses"):
        loop.train(within(1), RunFolder(tmp_path), images, tmp_path, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_it_before_the_run_folder_is_claimed(image_folder, tmp_path, capsys):
    asked = ["digits", "objective.coupler=WithinClasses", "--data", image_folder, "--run", tmp_path / "run"]
    assert main([str(word) for word in asked]) == 2
    assert "WithinClasses" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_passes_the_labels_of_its_training_images(tmp_path, monkeypatch):
    """An image's brightness is its class; held-out images lie between, whose labels must not slip in."""
    shade, given = torch.arange(40) % 4, []
    pixels = (60 * shade)[:, None, None, None] + torch.randint(0, 60, (40, 1, 8, 8))
    images = ImageSet("shades", pixels.to(torch.uint8), shade, torch.arange(40) % 10 == 0)
    monkeypatch.setattr(loop, "Batches", lambda *parts: given.append(parts[2]) or Batches(*parts))
    asked = replace(within(2), autoencoder=PixelSpace(), clip=None, network=DiT(patch=8, width=16, layers=1), steps=3)
    RunFolder(tmp_path).claim(asked)
    assert loop.train(asked, RunFolder(tmp_path), images, tmp_path, torch.device("cpu"))
    assert torch.equal(given[0], images.train.float().mean((1, 2, 3)).div(60, rounding_mode="floor").long())


def test_without_a_coupler_the_pool_changes_nothing():
    plain = config(3)
    plain = replace(plain, objective=replace(plain.objective, coupler=independent))
    batch = Batches(plain, LATENTS)(4)
    assert torch.equal(batch.z, draw(0, 4, batch.x.shape).z)


def test_dropout_draws_other_numbers_at_every_step():
    batches = Batches(config(1), LATENTS)
    assert len({batches.dropout_seed(step) for step in range(200)}) == 200


def test_a_batch_larger_than_the_data_is_said():
    with pytest.raises(UserError, match="batch_size=8 is larger than the 7 training images"):
        Batches(config(1), LATENTS[:7])


def test_a_gate_that_asks_the_latents_is_put_where_they_say():
    latents = 0.5 * torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    asked = Objective(coupler=exact, gate=AboveExplained(0.5))
    found = with_measured_gate(asked, latents).gate
    far = with_measured_gate(asked, 10 * latents).gate
    assert isinstance(found, Above)
    assert isinstance(far, Above)
    assert far.sigma == pytest.approx(10 * found.sigma, rel=1e-3)
    assert with_measured_gate(Objective(gate=AboveExplained()), latents).gate == AboveExplained()
    with pytest.raises(UserError, match="at least two samples"):
        with_measured_gate(asked, latents[:1])


@pytest.mark.parametrize("coupler", [independent, exact, Semidiscrete(steps=4)])
def test_what_a_teacher_is_shown_is_measured_on_the_latents_and_the_noise_they_get(coupler: Coupler):
    asked = replace(config(1).objective, coupler=coupler, gate=Above(0.5), teacher_input=KeepCovariance(components=5))
    whole = Batches(replace(config(1), objective=asked), LATENTS)
    parts = Batches(replace(config(1), objective=asked, micro_batches=2), LATENTS, parts=[1])
    for batches, part in ((whole, 0), (parts, 1)):
        measured = batches.objective.teacher_input
        assert isinstance(measured, CovarianceKept)
        assert measured.axes.shape == (LATENTS[0].numel(), 5)
        assert (measured.along > 0).any() == (coupler is not independent)
        batch = batches(3, part)
        p_hi, p_lo = (batches.objective.gate(t, 0.0) for t in (batch.pairs.t_hi, batch.pairs.t_lo))
        torch.testing.assert_close(batch.x_lo, measured(batch.x, batch.z, batch.pairs, p_hi, p_lo))
    again = Batches(replace(config(1), objective=asked), LATENTS)(3)
    assert torch.equal(again.x_lo, whole(3).x_lo)


def test_of_large_samples_fewer_are_measured(monkeypatch: pytest.MonkeyPatch):
    asked = replace(config(1).objective, coupler=exact, teacher_input=KeepCovariance())
    monkeypatch.setattr(batches_module, "MOST_MEASURED", 20 * LATENTS[0].numel())
    seen = []
    monkeypatch.setattr(KeepCovariance, "on", lambda self, x, paired: seen.append(len(paired[0])))
    with_measured_parts(asked, LATENTS)
    Batches(replace(config(1), objective=asked), LATENTS)
    assert seen == [20, 24]  # whole batches of 8
    assert batches_module.pairs_measured(LATENTS.shape[1:]) == 20


def test_latents_without_a_covariance_stop_what_a_teacher_is_shown_before_training():
    asked = replace(config(1).objective, coupler=independent, gate=AboveExplained(), teacher_input=KeepCovariance())
    assert Batches(replace(config(1), objective=asked), LATENTS)(0).x_lo is not None  # its gate is not asked
    with pytest.raises(UserError, match="the same: nothing varies"):
        Batches(replace(config(1), objective=asked), torch.ones_like(LATENTS))


def test_where_the_data_follow_the_noise_each_sample_is_the_one_its_noise_finds():
    found = config(1)
    found = replace(found, objective=replace(found.objective, coupler=Semidiscrete(steps=4), gate=everywhere))
    batches = Batches(found, LATENTS)
    batch = batches(3)
    assert torch.equal(batch.x, LATENTS[batches.pairing(batch.z)])
    again = Batches(found, LATENTS)(3)
    assert torch.equal(batch.z, again.z)
    assert not torch.equal(batch.z, batches(4).z)


def test_below_the_gate_the_noise_does_not_know_its_sample():
    found = config(1)
    found = replace(found, objective=replace(found.objective, coupler=Semidiscrete(steps=4), gate=Above(1.0)))
    batches = Batches(found, LATENTS)
    batch = batches(3)
    own = (LATENTS[batches.pairing(batch.z)] == batch.x).flatten(1).all(1)
    assert own[batch.pairs.t_hi > 1].all()
    assert not own[batch.pairs.t_hi <= 1].all()
