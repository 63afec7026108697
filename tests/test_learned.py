"""What the network learned, by noise level: known answers for a Gaussian, and that the report has it."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_gaussian_skip import CPU, Silent, Twice, gaussian_latents
from test_report import a_run, evaluation
from torch import Tensor

from reference_trainer.config import TrainConfig
from reference_trainer.data.classes import Classes
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.evaluation import learned as module
from reference_trainer.evaluation.learned import LEVELS, KernelDistance, compared, reading, what_was_learned
from reference_trainer.evaluation.metrics import kernel_distance
from reference_trainer.evaluation.pictures import draw_learned
from reference_trainer.evaluation.report import write_page
from reference_trainer.evaluation.table import as_table
from reference_trainer.model import TrainedModel
from reference_trainer.plotting import save_figure
from robustcm.flow_maps import FlowMapObjective
from robustcm.gaussian import Gaussian, LinearSkip
from robustcm.noise import NoiseRange

NOISE = NoiseRange()
X, DATA = gaussian_latents(1300).split((300, 1000))
GAUSSIAN = Gaussian.fit(gaussian_latents(50_000))


def learned(f, x: Tensor = X, data: Tensor = DATA, gaussian: Gaussian = GAUSSIAN) -> dict:
    found = compared(lambda x_t, t, rows: f(x_t, t), x, data, gaussian, NOISE, torch.Generator().manual_seed(5))
    return found | {"held_out": True}


def column(found: dict, name: str) -> Tensor:
    return torch.tensor([row[name] for row in found["levels"]])


def test_the_exact_function_of_gaussian_data_is_the_gaussian_s_and_stays_at_the_data():
    found = learned(GAUSSIAN.flow)
    assert torch.equal(column(found, "error"), column(found, "error_gaussian"))
    assert (column(found, "kernel_x1000") - found["floor"]).abs().max() < 4 * found["noise"]
    assert reading(found) == []


def test_the_linear_denoiser_has_the_error_one_and_leaves_the_data_where_it_averages():
    found = learned(GAUSSIAN.denoised)
    torch.testing.assert_close(column(found, "error"), torch.ones(LEVELS))
    distance = column(found, "kernel_x1000") - found["floor"]
    assert abs(distance[0]) < found["noise"]
    assert distance[-1] > 10 * found["noise"]


def test_the_error_of_the_gaussian_s_function_goes_from_one_to_two():
    """Of white data: (1 - a)^2 l + a^2 t^2 over l t^2 / (l + t^2), a = sqrt((l + s^2) / (l + t^2))."""
    variance = 0.25
    gaussian = Gaussian.of(torch.zeros(32), variance * torch.eye(32, dtype=torch.float64))
    x = 0.5 * torch.randn(300, 32, generator=torch.Generator().manual_seed(3))
    found = learned(gaussian.flow, x, x, gaussian)
    t = column(found, "sigma")
    a = ((variance + 0.002**2) / (variance + t**2)).sqrt()
    expected = ((1 - a) ** 2 * variance + a**2 * t**2) / (variance * t**2 / (variance + t**2))
    torch.testing.assert_close(column(found, "error"), expected, rtol=0.06, atol=0)
    torch.testing.assert_close(column(found, "explained"), variance / (variance + t**2), rtol=0.06, atol=1e-3)


def test_small_noise_that_was_not_learned_is_said():
    said = reading(learned(lambda x_t, t: x_t))
    assert said[0].startswith("at noise 0.02 to ")
    assert "not learned there yet" in said[0]


@pytest.mark.parametrize(("factor", "what"), [(3.0, "that is lost from noise "), (0.3, "that is there from noise ")])
def test_where_quality_is_lost_is_the_level_it_is_lost_at(factor: float, what: str):
    """Outputs that are too far out are not among the data; those drawn to the mean are, and a distance sees it."""
    said = reading(learned(lambda x_t, t: torch.where(t > 5, factor, 1.0).reshape(-1, 1, 1, 1) * GAUSSIAN.flow(x_t, t)))
    assert 5 <= float(" ".join(said).split(what)[1].split()[0]) < 15


def test_the_distance_is_the_one_of_the_tables():
    """There the mean over subsets of the larger set."""
    ours = KernelDistance.to(DATA)
    assert ours(X) == pytest.approx(kernel_distance(DATA.flatten(1), X.flatten(1)), abs=ours.noise(100))
    far = 1.5 * X
    assert ours(far) == pytest.approx(kernel_distance(DATA.flatten(1), far.flatten(1)), rel=0.15)


def test_the_noise_of_a_distance_is_its_spread_over_samples_of_the_data():
    others = [gaussian_latents(8000)[1300:][i * 100 : i * 100 + 100] for i in range(60)]
    found = torch.tensor([KernelDistance.to(DATA)(those) for those in others])
    distance = KernelDistance.to(DATA)
    assert distance.noise(100) == pytest.approx(float(found.std()), rel=0.6)
    assert distance.noise(500) == pytest.approx(distance.noise(250) / 2)  # of more than a quarter: as 1 / n


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match=r"300 of 300 outputs at noise 0\.02 are NaN or infinite"):
        learned(lambda x_t, t: x_t * torch.nan)


def model_and_images(n: int = 200, held_out: int = 60) -> tuple[TrainedModel, ImageSet, Tensor]:
    """A network that gives nothing around the flow of its own data, whose images are latents drawn large."""
    raw = gaussian_latents(n)
    pixels = (127.5 * (Twice().decode(raw / 4) + 1)).clamp(0, 255).to(torch.uint8)
    images = ImageSet("squares", pixels, None, torch.arange(n) < held_out)
    space = LatentSpace.of(Twice(), Twice().encode(pixels.float() / 127.5 - 1)[held_out:])
    latents = space.normalise(Twice().encode(images.train.float() / 127.5 - 1))
    model = TrainedModel(TrainConfig(), Silent(), space, (2, 4, 4), 1, CPU)
    return replace(model, skip=LinearSkip(Gaussian.fit(latents))), images, latents


@pytest.mark.parametrize(("held_out", "is_held_out"), [(60, True), (20, False)])
def test_a_model_is_asked_on_held_out_images_if_there_are_enough(held_out: int, is_held_out: bool):
    model, images, latents = model_and_images(200, held_out)
    found = what_was_learned(model, images, latents, 0)
    assert found["held_out"] is is_held_out
    assert found["n"] == (60 if is_held_out else 90)
    assert len(found["levels"]) == LEVELS


@pytest.mark.parametrize("held_out", [60, 20])
def test_each_image_is_asked_with_its_own_label(held_out: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH", 25)
    model, images, latents = model_and_images(200, held_out)
    asked: list[Tensor] = []

    class Told(Silent):
        def forward(self, x: Tensor, *c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
            assert labels is not None
            assert len(labels) == len(x)
            asked.append(labels)
            return torch.zeros_like(x)

    images = replace(images, labels=torch.arange(200))
    what_was_learned(replace(model, network=Told(), classes=Classes(("a", "b"), (1, 1), "")), images, latents, 3)
    order = torch.randperm(180, generator=torch.Generator().manual_seed(3))  # as training_images has it
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(3))  # as held_out_order
    expected = images.labels[:60][shuffled] if held_out == 60 else 20 + order[:90]
    assert torch.equal(torch.cat(asked), expected.repeat(LEVELS))


def test_it_is_asked_of_consistency_functions():
    model, images, latents = model_and_images()
    with pytest.raises(UserError, match="asked of consistency functions alone"):
        what_was_learned(replace(model, config=TrainConfig(objective=FlowMapObjective())), images, latents, 0)


def test_the_picture_has_both_lines_and_what_they_are_held_against():
    figure = draw_learned(learned(GAUSSIAN.flow))
    assert [len(ax.lines) for ax in figure.axes] == [3, 3, 3]


@pytest.mark.usefixtures("drawn_pictures")
def test_table_and_report_say_it(tmp_path: Path):
    found = learned(lambda x_t, t: x_t)
    run = a_run(tmp_path / "run")
    picture = save_figure(draw_learned(found), run.root / "learned.png")
    page = html.unescape(write_page(run, evaluation() | {"learned": found}, [picture]).read_text())
    shown = {name: value for name, value in evaluation().items() if name != "manifest"}
    for sentence in reading(found):
        assert sentence in as_table(shown | {"learned": found})
        assert sentence not in as_table(shown)
        assert sentence in page
    assert "small noise is not learned" in page
