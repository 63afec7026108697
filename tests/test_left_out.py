"""What cannot be measured is left out of an evaluation and said; the rest is finite."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder, ImageSet, to_unit
from reference_trainer.data.latents import ImpulsiveOutliers, LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.evaluation.evaluate import brief, evaluate
from reference_trainer.evaluation.features import Imported
from reference_trainer.evaluation.pictures import draw_sheet
from reference_trainer.evaluation.reference import Reference
from reference_trainer.evaluation.sets import ORDER
from reference_trainer.evaluation.table import as_table
from reference_trainer.evaluation.training_set import TrainingSet, training_images
from reference_trainer.model import TrainedModel
from robustcm.schedules import FixedCurriculum, LevelGrid


class Untrained(torch.nn.Module):
    """Returns the noise it is given."""

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return x


def small(n: int, held_out_every: int) -> tuple[ImageSet, TrainedModel]:
    """``n`` grey images of 4 x 4, of which every so manieth is held out, and an untrained model of their pixels."""
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet("small", pixels, None, torch.arange(n) % held_out_every == held_out_every - 1)
    space = LatentSpace.of(PixelSpace().build(1, {}), to_unit(images.train))
    config = TrainConfig(clip=None, data=ImageFolder(path="small"))
    return images, TrainedModel(config, Untrained(), space, (1, 4, 4), 0, torch.device("cpu"))


def means_of(k: int) -> Imported:
    return Imported(f"{k} features", lambda pixels: pixels.float().flatten(1)[:, :k])


def assert_json(evaluation: dict) -> None:
    json.dumps(evaluation, allow_nan=False)
    assert as_table(evaluation)


@pytest.mark.parametrize("n", range(10, 20))
def test_a_folder_with_one_held_out_image_is_measured_as_far_as_that_goes(n: int):
    images, model = small(n, 10)
    found = evaluate(model, images, means_of(2))
    assert found["left_out"].keys() & set(ORDER) == {"floor: held-out images"}
    assert "1 image" in found["left_out"]["floor: held-out images"]
    assert any("1 held-out image" in note for note in found["notes"])
    assert "left out: floor: held-out images (1 image" in as_table(found)
    assert_json(found)


@settings(max_examples=settings.default.max_examples * 2 // 5)  # each is a whole evaluation
@given(n=st.integers(2, 12), every=st.integers(2, 12), k=st.integers(1, 16))
def test_of_any_small_set_what_cannot_be_measured_is_left_out_and_the_rest_is_finite(n: int, every: int, k: int):
    images, model = small(n, every)
    if len(images.train) < 2:  # whose latents have no spread to be normalised by
        return
    found = evaluate(model, images, means_of(k))
    assert found["rows"].keys() | (found["left_out"].keys() & set(ORDER)) == set(ORDER)
    of_latents = found.get("latents", {"rows": {}})["rows"]
    of_all = [*found["rows"].values(), *of_latents.values()]
    assert all(math.isfinite(value) for row in of_all for value in row.values())
    for name, row in found["rows"].items():  # a figure that is not there has its reason
        if "evaluation" in name or "Gaussian" in name:
            assert ("frechet_rec" in row) != (f"{name}, to the reconstructions" in found["left_out"])
            assert (name in of_latents) != (f"{name}, in latents" in found["left_out"])
    assert_json(found)


@pytest.mark.parametrize(("n", "k"), [(16, 16), (17, 16), (4, 3), (3, 3)])
def test_no_more_images_than_features_is_said(n: int, k: int):
    images, model = small(2 * n, 2)
    notes = [note for note in evaluate(model, images, means_of(k), bounds=False)["notes"] if "latents" not in note]
    assert [("singular" in note, f"the {k} features in every row" in note) for note in notes] == (
        [(True, True), (False, False)] if n <= k else []
    )


def test_features_that_are_not_finite_leave_out_the_rows_they_are_in_and_no_other():
    images, model = small(60, 3)
    dark = images.held_out.float().mean((1, 2, 3)).min()

    def poisoned(pixels: torch.Tensor) -> torch.Tensor:
        vectors = pixels.float().flatten(1)[:, :3]
        return torch.where((pixels.float().mean((1, 2, 3)) == dark)[:, None], torch.inf, vectors)

    found = evaluate(model, images, Imported("poisoned", poisoned))
    assert found["left_out"].keys() == {"floor: held-out images"}
    assert found["left_out"]["floor: held-out images"].startswith("1 of 20 images have NaN or infinite features")
    assert all("frechet_held_out" not in row for row in found["rows"].values())


def test_features_that_tell_no_image_from_another_measure_nothing():
    images, model = small(60, 3)
    found = evaluate(model, images, Imported("constant", lambda pixels: torch.full((len(pixels), 4), 3.0)))
    assert found["rows"] == {}
    assert all("the same for all 40 training images" in why for why in found["left_out"].values())
    assert as_table(found).count("left out: ") == 1  # one reason, one line
    assert brief(found)["rows"] == {}


def test_features_that_overflow_are_left_out_not_scored():
    images, model = small(60, 3)
    found = evaluate(model, images, Imported("large", lambda pixels: 1e30 * pixels.float().flatten(1)[:, :3]))
    assert "1 evaluation" in found["left_out"]
    assert "not finite" in found["left_out"]["1 evaluation"]
    assert_json(found)


class FailsOnSamples:
    """Decodes what is near the data, and gives NaN elsewhere, as a decoder in half precision does."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.where(latents.abs().amax((1, 2, 3), keepdim=True) > 1.01, torch.nan, latents)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


def test_images_that_are_nan_are_not_scored_as_black_ones():
    images, model = small(60, 3)
    model = replace(model, space=replace(model.space, codec=FailsOnSamples()))
    found = evaluate(model, images, means_of(3))
    assert "reconstructions" in found["rows"]
    for name in ("1 evaluation", "2 evaluations"):
        assert re.match(r"the decoder gives NaN or infinite values in \d+ of 40 images", found["left_out"][name])
    with pytest.raises(UserError, match="the decoder gives NaN"):
        model.images(3, (80.0,), seed=0)


def test_a_network_that_has_diverged_is_not_blamed_on_the_decoder():
    images, model = small(60, 3)

    class Diverged(torch.nn.Module):
        def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x, torch.nan)

    found = evaluate(replace(model, network=Diverged()), images, means_of(3))
    assert "the network has diverged" in found["left_out"]["1 evaluation"]
    assert "reconstructions" in found["rows"]


def test_a_schedule_with_too_few_levels_costs_the_second_evaluation_alone():
    images, model = small(60, 3)
    levels = LevelGrid(curriculum=FixedCurriculum(num_levels=2))
    config = replace(model.config, objective=replace(model.config.objective, levels=levels), second_sigma=79.0)
    found = evaluate(replace(model, config=config), images, means_of(3), bounds=False)
    assert (found["rows"].keys(), found["left_out"].keys()) == ({"1 evaluation"}, {"2 evaluations"})
    assert "trained noise levels" in found["left_out"]["2 evaluations"]


def test_a_sheet_of_fewer_images_than_a_row_shows_them_all():
    figure = draw_sheet([("few", torch.zeros(3, 1, 4, 4, dtype=torch.uint8))])
    assert figure.axes[0].images[0].get_array().shape == (5, 15, 3)


class Blurs:
    """An autoencoder that halves what is not grey: the images are out of reach, the reconstructions are not."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 2

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


class Perfect(TrainedModel):
    """Draws the training latents."""

    def latents(self, n: int, *_: object, first: int = 0, **__: object) -> torch.Tensor:
        return self.latents_of(training_images(small(60, 3)[0], seed=0))[first : first + n]


def perfect(**options: object) -> tuple[ImageSet, Perfect]:
    """A model that has learned its data exactly, through an autoencoder that loses much."""
    images, model = small(60, 3)
    config = replace(model.config, **options)
    space = replace(model.space, codec=Blurs())
    return images, Perfect(config, model.network, space, model.shape, 0, model.device)


@pytest.mark.parametrize("bounds", [True, False])
def test_a_perfect_model_is_far_from_the_images_and_at_the_reconstructions(bounds: bool):
    images, model = perfect()
    found = evaluate(model, images, means_of(3), bounds=bounds)
    for name in ("1 evaluation", "2 evaluations"):
        row, latents = found["rows"][name], found["latents"]["rows"][name]
        assert row["frechet"] > 1000 * abs(row["frechet_rec"])
        assert row["kernel_rec_x1000"] < row["kernel_x1000"]
        assert latents["whitened_frechet"] == pytest.approx(0, abs=1e-9)
        assert latents["recall"] == latents["precision"] == 1
        assert [latents[f"variance_{group}"] for group in ("first_4", "next_12")] == pytest.approx([1, 1])
    assert (found["latents"]["dimensions"], found["latents"]["components"]) == (16, 16)
    assert_json(found)


def test_outliers_on_purpose_are_no_part_of_the_reconstructions_but_of_the_row_that_says_what_they_cost():
    outliers = ImpulsiveOutliers(share=0.1)
    clean, spoiled = (evaluate(m, i, means_of(3)) for i, m in (perfect(), perfect(outliers=outliers)))
    features = means_of(3)
    images, model = perfect(outliers=outliers)
    pure, dirty = (
        Reference.of(m, TrainingSet.of(images, 0), features)
        for m in (replace(model, config=perfect()[1].config), model)
    )
    torch.testing.assert_close(dirty.reconstructions.some, pure.reconstructions.some, rtol=0, atol=0)
    assert not torch.equal(dirty.fitted.some, pure.fitted.some)
    assert pure.fitted is pure.reconstructions
    assert "frechet_rec" not in clean["rows"]["reconstructions"]  # against itself
    row = spoiled["rows"]["1 evaluation"]  # draws the outliers, as the run trains on them
    assert row["frechet_rec"] == spoiled["rows"]["reconstructions"]["frechet_rec"] > 1
    assert spoiled["latents"]["rows"]["1 evaluation"]["variance_first_4"] > 1.5


def test_the_gaussian_bound_is_one_draw_a_seed_and_has_the_moments_of_the_latents():
    images, model = perfect()
    first, again, other = (evaluate(model, images, means_of(3), seed=seed) for seed in (0, 0, 1))
    name = "bound: Gaussian latents decoded"
    assert first["rows"][name] == again["rows"][name] != other["rows"][name]
    row = first["latents"]["rows"][name]
    assert row["variance_first_4"] == pytest.approx(1, abs=0.4)
    assert "ceiling: noise decoded" not in first["latents"]["rows"]


def test_reconstructions_that_cannot_be_decoded_cost_their_own_figures_alone():
    """Latents still compare, and so do images: real ones with one another."""
    images, model = small(60, 3)

    class Broken(Blurs):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.full_like(latents, torch.nan)

    found = evaluate(replace(model, space=replace(model.space, codec=Broken())), images, means_of(3))
    assert found["rows"].keys() == {"floor: held-out images", "floor: half against half"}
    assert found["latents"]["rows"].keys() >= {"1 evaluation", "2 evaluations"}
    assert "the decoder gives NaN" in found["left_out"]["reconstructions"]
    assert_json(found)


def test_where_only_samples_decode_their_distance_to_the_images_stands_and_the_other_has_its_reason():
    class Far(Blurs):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.where(latents.abs().amax((1, 2, 3), keepdim=True) > 1.01, latents.clamp(-1, 1), torch.nan)

    class Wild(Perfect):
        def latents(self, n: int, *_: object, first: int = 0, **__: object) -> torch.Tensor:
            return 5 * super().latents(n, first=first)

    images, model = perfect()
    space = replace(model.space, codec=Far())
    model = Wild(model.config, model.network, space, model.shape, 0, model.device)
    found = evaluate(model, images, means_of(3), bounds=False)
    row = found["rows"]["1 evaluation"]
    assert "frechet_rec" not in row
    assert "the decoder gives NaN" in found["left_out"]["1 evaluation, to the reconstructions"]
    assert brief(found)["left_out"] == found["left_out"]
    line = f"{'1 evaluation':32}{row['n']:6d}{row['frechet']:10.2f}{row['kernel_x1000']:9.2f}{'-':>13}{'-':>12}"
    assert line in as_table(found)


def test_figures_of_an_earlier_version_are_dashes_and_its_evaluations_can_be_cut():
    row = {"n": 40, "frechet": 0.15, "kernel_x1000": 0.0, "precision": 1.0, "recall": 1.0}
    old = {"step": 3, "seed": 0, "features": "some", "reference": "these", "rows": {"1 evaluation": row}}
    line = as_table(old).splitlines()[3]
    assert line.split() == ["1", "evaluation", "40", "0.150", "0.00", "-", "-", "1.000", "1.000", "-"]
    assert brief(old) == {key: old[key] for key in ("step", "seed", "features", "rows")}
