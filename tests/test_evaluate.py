"""The classifier that judges is right, the metrics order what they should, and the pictures show what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import Digits, ImageSet, to_unit
from reference_trainer.data.latents import LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.evaluation.digit_classifier import DigitClassifier, jittered, load_digit_classifier
from reference_trainer.evaluation.evaluate import evaluate
from reference_trainer.evaluation.features import Imported, PooledLatents
from reference_trainer.evaluation.metrics import frechet_distance
from reference_trainer.evaluation.pictures import draw_losses, draw_sheet, draw_tails
from reference_trainer.evaluation.rows import Row, compare, measure
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.table import as_table
from reference_trainer.model import TrainedModel
from reference_trainer.plotting import tile
from reference_trainer.training.meters import LevelMeter, TailMeter
from robustcm.noise import NoiseRange
from robustcm.objective import Terms
from robustcm.schedules import FixedCurriculum, LevelGrid, LevelPairs


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return Digits().load()


def test_the_shipped_classifier_is_right_on_99_percent_of_held_out_digits(digits: ImageSet):
    labels = digits.labels[digits.is_held_out]
    assert load_digit_classifier().accuracy(digits.held_out, labels) >= 0.99


def test_frechet_distance_orders_real_blurred_and_noise(digits: ImageSet):
    features = load_digit_classifier()
    real = Statistics.of(features(digits.train[::6]))
    others = digits.train[1::6]
    blurred = torch.nn.functional.avg_pool2d(others.float(), 5, 1, 2).to(torch.uint8)
    noise = torch.randint(0, 256, others.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    near, middle, far = (compare(real, Statistics.of(features(x)))["frechet"] for x in (others, blurred, noise))
    assert near < 10 < middle < far


def of_probabilities(most: list[float]) -> Statistics:
    """Features of images whose most probable digit has these probabilities; see ``PLAIN``."""
    most = torch.tensor(most)[:, None]
    return Statistics.of(torch.cat([most, ((1 - most) / 9).expand(-1, 9)], 1).log())


PLAIN = DigitClassifier(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
"""Its features are logits."""


def measured(others: Statistics, real: Statistics, held_out: Statistics | None = None) -> Row:
    row = measure(others, real, PLAIN, held_out)
    assert isinstance(row, dict)
    return row


def test_an_image_is_a_sure_digit_from_a_probability_of_nine_tenths_on():
    drawn = of_probabilities([0.99, 0.95, 0.91, 0.89, 0.7, 0.6, 0.51, 0.2])
    assert measured(drawn, of_probabilities([0.99, 0.9, 0.8]))["sure_digits"] == 3 / 8


def test_the_distance_to_held_out_images_is_theirs_and_asks_for_more_of_them_than_features(rng: torch.Generator):
    drawn, real, held_out = (torch.randn(20, 10, generator=rng) + i for i in (0, 1, 3))
    of_drawn, of_real = Statistics.of(drawn), Statistics.of(real)
    row = measured(of_drawn, of_real, Statistics.of(held_out))
    assert row["frechet_held_out"] == frechet_distance(held_out, drawn) > 2 * row["frechet"]
    assert row["frechet"] == frechet_distance(real, drawn)
    assert "frechet_held_out" in measured(of_drawn, of_real, Statistics.of(held_out[:11]))
    assert "frechet_held_out" not in measured(of_drawn, of_real, Statistics.of(held_out[:10]))
    assert "frechet_held_out" not in measured(of_drawn, of_real)


def test_jitter_moves_little_and_keeps_the_range():
    images = -torch.ones(8, 1, 32, 32)
    images[:, :, 12:20, 12:20] = 1
    moved = jittered(images, torch.Generator().manual_seed(0))
    assert moved.min() >= -1 - 1e-6
    assert moved.max() <= 1 + 1e-6
    assert (moved[:, :, 14:18, 14:18] > 0.5).float().mean() > 0.9
    assert not torch.equal(moved[0], moved[1])


def test_features_of_the_user_are_imported_by_name():
    assert Imported.of("tests.test_evaluate:mean_features").name == "tests.test_evaluate:mean_features"
    assert Imported.of("tests.test_evaluate:mean_features")(torch.ones(3, 1, 2, 2)).shape == (3, 1)
    with pytest.raises(UserError, match="module:function"):
        Imported.of("no_such_module:f")


def mean_features():
    return lambda pixels: pixels.float().mean((1, 2, 3))[:, None]


def test_tile_lays_images_out_row_by_row():
    pixels = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 2, 2) * 10
    picture = tile(pixels, columns=2)
    assert picture.shape == (6, 6, 3)  # two images of 2 and a line after each
    assert [picture[0, 0, 0], picture[0, 3, 0], picture[3, 0, 0], picture[3, 3, 0]] == [0, 10, 20, 30]
    assert (picture[2] == 255).all()


def test_a_sheet_has_a_titled_panel_for_each_set():
    figure = draw_sheet([("real", torch.zeros(16, 1, 4, 4, dtype=torch.uint8)), ("fake", torch.zeros(16, 3, 4, 4))])
    assert [ax.get_title() for ax in figure.axes] == ["real", "fake"]


def rows_of_a_run(steps: int = 3) -> list[dict]:
    """Rows as the loop logs them, from residuals that halve each time."""
    rows = []
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        student = torch.randn(64, 2, 2, 2, generator=generator) / 2**step
        r = student.flatten(1).norm(dim=1)
        depth = torch.arange(64) / 64
        terms = Terms(
            r.mean(), 2 * r, 0 * r, r, 0.1, student, torch.zeros_like(student), torch.zeros(0), torch.zeros(0)
        )
        pairs = LevelPairs(r, r, depth, 10 * 2**step + 1)
        meter, tails = LevelMeter(), TailMeter()
        cpu = torch.device("cpu")
        row = {"step": step, "num_levels": pairs.num_levels, "c": 0.1, "lr": 1e-3}
        row |= meter.read(meter.add(meter.init(cpu), terms, pairs))
        row["td"] = tails.read(tails.add(tails.init(cpu), terms, pairs))
        rows.append(row)
    return rows


def test_meters_give_the_means_and_the_spread_of_each_range_of_levels():
    (row,) = rows_of_a_run(1)
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(64, 2, 2, 2, generator=generator) / 2
    r = student.flatten(1).norm(dim=1)
    in_first = torch.arange(64) / 64 * 12 < 1
    assert row["r"] == pytest.approx(float(r.mean()))
    assert row["consistency"] == pytest.approx(float(2 * r.mean()))
    assert row["by_level"]["r"][0] == pytest.approx(float(r[in_first].mean()))
    q1, q3 = np.quantile(student[in_first].numpy(), [0.25, 0.75])
    assert row["td"]["iqr"][0] == pytest.approx(q3 - q1, rel=0.05)
    assert [row["td"]["q1"][0], row["td"]["q3"][0]] == pytest.approx([q1, q3], rel=0.05)


def test_curves_have_a_line_for_each_range_of_levels():
    rows = rows_of_a_run()
    assert len(draw_losses(rows).axes[0].lines) == 12 + 2  # and one where N changed
    assert len(draw_tails(rows).axes[0].lines) == 12


def test_the_table_names_its_features_and_reference():
    row = {"n": 10, "frechet": 1.0, "kernel_x1000": 2.0, "precision": 0.5, "recall": 0.25}
    table = as_table(
        {"step": 3, "features": "some features", "reference": "these images", "rows": {"1 evaluation": row}}
    )
    for word in ("some features", "these images", "1 evaluation", "0.250"):
        assert word in table


def test_the_table_says_how_near_reconstructions_come_and_what_their_own_features_cannot_see():
    row = {"n": 40, "frechet": 0.15, "kernel_x1000": 0.0, "precision": 1.0, "recall": 1.0}
    rows = {"1 evaluation": row, "reconstructions": row | {"psnr": 19.04}}
    own = {"step": 3, "features": PooledLatents.name, "reference": "these images", "rows": rows}
    assert "PSNR 19.0 dB to the images themselves (pixels 0 .. 255, mean over the 40 images)" in as_table(own)
    assert "cannot judge it" in as_table(own)
    assert "cannot judge it" not in as_table(own | {"features": "some:network"})
    brief = as_table(own | {"rows": {"1 evaluation": row}})
    assert ("reconstructions: PSNR" in brief, "samples.png" in brief) == (False, False)  # it has neither
    assert "reconstructions beside the images show it" in brief


def test_an_evaluation_puts_real_images_near_the_floor_and_noise_at_the_ceiling(digits: ImageSet):
    """With a model that returns real held-out digits: every class must count, though the data are sorted by class."""

    class Copier(TrainedModel):
        def latents(self, n: int, *_: object, first: int = 0, **__: object) -> torch.Tensor:
            return self.latents_of(digits.held_out)[first : first + n]

    digits = ImageSet("digits", digits.pixels[::3], digits.labels[::3], digits.is_held_out[::3])
    space = LatentSpace.of(PixelSpace().build(1, {}), to_unit(digits.train))
    model = Copier(TrainConfig(clip=None), torch.nn.Identity(), space, (1, 32, 32), 0, torch.device("cpu"))
    rows = evaluate(model, digits, load_digit_classifier())["rows"]
    assert rows["1 evaluation"]["frechet"] == rows["floor: held-out images"]["frechet"] < 20
    assert rows["ceiling: noise decoded"]["frechet"] > 10 * rows["floor: half against half"]["frechet"]
    assert rows["1 evaluation"]["precision"] > 0.7
    assert rows["1 evaluation"]["recall"] > 0.7
    assert rows["reconstructions"]["frechet"] < 0.01
    assert rows["reconstructions"]["psnr"] > 58  # the pixels themselves
    assert rows["1 evaluation"]["frechet_rec"] == pytest.approx(rows["1 evaluation"]["frechet"], abs=0.01)
    assert rows["2 evaluations"]["frechet"] < rows["bound: Gaussian latents decoded"]["frechet"]
    assert rows["bound: Gaussian latents decoded"]["frechet"] < rows["ceiling: noise decoded"]["frechet"]


def sampled_at(num_levels: int, recognised_at: float, evaluations: int, **options: object) -> list[float]:
    config = replace(TrainConfig(clip=None), **options)
    curriculum = FixedCurriculum(num_levels=num_levels)
    config = replace(config, objective=replace(config.objective, levels=LevelGrid(curriculum=curriculum)))
    space = LatentSpace(PixelSpace().build(1, {}), torch.zeros(1), torch.ones(1), recognised_at)
    model = TrainedModel(config, torch.nn.Identity(), space, (1, 2, 2), 10, torch.device("cpu"))
    return list(model.sigmas(evaluations))


@given(num_levels=st.integers(20, 700), recognised_at=st.floats(0.01, 1000))
def test_samples_are_drawn_at_levels_of_training_that_fall(num_levels: int, recognised_at: float):
    levels = NoiseRange().levels(num_levels).tolist()
    found = sampled_at(num_levels, recognised_at, 2)
    assert found[0] == 80
    assert found[1] in levels[1:]
    wanted = min(recognised_at, 40)
    assert all(abs(math.log(found[1] / wanted)) <= abs(math.log(t / wanted)) for t in levels)


def test_a_second_level_of_the_user_goes_before_the_measured_one():
    assert sampled_at(641, 2.0, 2)[1] == pytest.approx(2.0, rel=0.01)
    assert sampled_at(641, 2.0, 3, second_sigma=0.8)[1:] == pytest.approx([0.8, 0.4], rel=0.01)


def test_more_evaluations_than_levels_are_refused():
    with pytest.raises(UserError, match="more than there are trained noise levels"):
        sampled_at(3, 2.0, 4)
