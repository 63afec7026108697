"""The tables behind the first: what is above the floor, what the latents say, one line a suite, several as one."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reference_trainer.__main__ import main
from reference_trainer.ablation.comparison import ONE, TWO, Result
from reference_trainer.ablation.further import (
    KERNEL,
    about_network,
    all_suites,
    as_tables,
    excess,
    floor_of,
    in_latents,
    ratio_of,
    to_reconstructions,
)
from reference_trainer.ablation.joined import joined
from reference_trainer.ablation.ladder import BASELINE, SIZES, SUITES, of_size
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError
from reference_trainer.evaluation.features import PooledLatents
from reference_trainer.evaluation.metrics import frechet_distance
from reference_trainer.evaluation.sets import CEILING, FITTED, GAUSSIAN, HALVES
from reference_trainer.presets import digits, on_folder, photographs

BOUNDS: dict[str, dict[str, float]] = {
    HALVES: {"n": 500, "frechet": 9.0, "frechet_rec": 4.0, "kernel_rec_x1000": 0.1},
    FITTED: {"n": 1000, "frechet": 30.0, "psnr": 24.56},
    GAUSSIAN: {"n": 1000, "frechet": 60.0, "frechet_rec": 50.0, "kernel_rec_x1000": 40.0},
    CEILING: {"n": 1000, "frechet": 900.0},
}


def latents(variance: float) -> dict[str, float]:
    return {"kernel_x1000": 5.0, "whitened_frechet": 7.0, "recall": 0.25, "variance_first_4": variance}


def result(arm: str, seed: int, rec: float, kernel: float, suite: str = "d64", bounds: bool = False) -> Result:
    rows = {
        name: {"n": 1000, "frechet": rec + 20, "frechet_rec": rec, "kernel_rec_x1000": kernel} for name in (ONE, TWO)
    }
    of_latents = {ONE: latents(1 + seed / 10), TWO: latents(2.0)}
    return Result(
        suite=suite,
        arm=arm,
        seed=seed,
        steps=10,
        seconds=1.0,
        rows=rows | (BOUNDS if bounds else {}),
        latents={"dimensions": 64, "rows": of_latents | ({GAUSSIAN: latents(1.0)} if bounds else {})},
        autoencoder={"psnr_held_out": 23.4},
    )


def runs(suite: str = "d64") -> list[Result]:
    return [
        result(BASELINE, 0, 22, 30, suite, bounds=True),
        result("ours", 0, 12, 15, suite),
        result(BASELINE, 1, 42, 30, suite),
        result("ours", 1, 12, 15, suite),
    ]


def test_the_floor_is_that_of_the_halves_brought_to_as_many_samples():
    assert floor_of(runs()) == 2.0
    assert floor_of(runs()[1:]) is None


def test_a_perfect_sampler_is_at_the_floor():
    """Frechet distance of two sets from one distribution, n each, is half that of two of n / 2: what the rule says."""
    generator = torch.Generator().manual_seed(0)
    whole, halves = [], []
    for _ in range(40):
        real, fake = torch.randn(2, 400, 5, generator=generator)
        whole.append(frechet_distance(real, fake))
        halves.append(frechet_distance(real[:200], real[200:]))
    assert sum(whole) / sum(halves) == pytest.approx(0.5, rel=0.1)


def test_what_is_above_the_floor_is_compared_seed_by_seed():
    assert excess(runs(), BASELINE, ONE) == {0: 20.0, 1: 40.0}
    table = to_reconstructions(runs(), BASELINE)
    assert table[0].startswith("To the reconstructions; floor 2.00 for 1000 samples")
    (ours,) = (line for line in table if line.startswith("| ours"))
    assert ours.startswith("| ours | 10.00 (10.00, 10.00) | 0.35 (")  # sqrt(10/20 10/40)
    assert "| 15.00 (15.00, 15.00) | 0.50 (0.50 .. 0.50) |" in ours
    assert "| bound: Gaussian latents decoded | 48.00 |  | 40.00 |" in "\n".join(table)
    assert "No better" not in "\n".join(table)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (
            (0.9, 2.5, 1.4, 0.8, 0.7),
            "is 0.80 times the best linear denoiser's at noise 0.8, at its best: it has learned",
        ),
        (
            (0.9, 2.5, 1.4, 1.6, 0.7),
            "is 1.40 times the best linear denoiser's at noise 0.3, at its best: what is linear",
        ),
    ],
)
def test_a_network_is_large_enough_if_it_beats_the_linear_denoiser_where_noise_hides_part_of_the_data(errors, said):
    """At the smallest noise all are right, at large noise no sample can be near the data it is made of."""
    levels = [
        {"sigma": sigma, "explained": explained, "error": error}
        for sigma, explained, error in zip(
            (0.02, 0.1, 0.3, 0.8, 9.0), (0.999, 0.98, 0.9, 0.6, 0.1), errors, strict=True
        )
    ]
    found = [replace(runs()[0], learned={"levels": levels}), *runs()[1:]]
    (line, _) = about_network(found)
    assert said in line
    assert line.startswith("Network: the error of iLCT, seed 0, ")
    assert line in as_tables(found, BASELINE)
    assert about_network(runs()) == []


def test_what_lies_below_chance_counts_as_chance_and_no_seed_is_dropped():
    """By a seed below 0 alone a ratio would be that of the others."""
    found = [*runs(), result("lucky", 0, 1.0, -0.7), result("lucky", 1, 12, 15)]
    assert excess(found, "lucky", ONE) == {0: -1.0, 1: 10.0}
    by_excess, by_kernel = (ratio_of(found, "lucky", BASELINE, ONE, metric) for metric in ("frechet_rec", KERNEL))
    assert by_excess.pairs == by_kernel.pairs == 2
    assert by_excess.mean == pytest.approx(math.sqrt(0.2 / 20 * 10 / 40))
    assert by_kernel.mean == pytest.approx(math.sqrt(0.1 / 30 * 15 / 30))


def test_features_in_which_a_gaussian_is_without_a_flaw_are_said():
    manifest = {"features": {"name": PooledLatents.name}}
    found = [replace(run, manifest=manifest) for run in runs()]
    assert "--features wavelets" in "\n".join(to_reconstructions(found, BASELINE))
    assert "--features" not in "\n".join(to_reconstructions(runs(), BASELINE))


def test_an_arm_no_better_than_the_gaussian_is_named():
    found = [*runs(), result("bad", 0, 50, 90)]
    assert "No better than the Gaussian at 1 evaluation: bad." in to_reconstructions(found, BASELINE)


def test_the_latents_have_a_row_for_one_evaluation_and_for_two_and_for_the_gaussian():
    table = in_latents(runs())
    assert f"| {BASELINE} | 1 | 5.00 | 7.0 | - | 0.25 | 1.05 | - | - |" in table  # the mean of 1.0 and 1.1
    assert "| ours | 2 | 5.00 | 7.0 | - | 0.25 | 2.00 | - | - |" in table
    assert f"| {GAUSSIAN} |  | 5.00 | 7.0 | - | 0.25 | 1.00 | - | - |" in table
    assert in_latents([replace(run, latents={}) for run in runs()]) == []


def test_all_suites_have_a_line_each_with_what_bounds_them():
    assert all_suites(runs(), BASELINE) == []
    table = all_suites([*runs(), *runs("d256")], BASELINE)
    (line,) = (line for line in table if line.startswith("| d256"))
    assert line.startswith("| d256 | 64 | 24.6 | 2.00 | 48.00 | 30.00 | 30.00 | 0.35 (")


@pytest.mark.parametrize("found", [runs(), runs()[1:], [replace(run, latents={}) for run in runs()]])
def test_every_table_is_as_wide_as_its_head(found: list[Result]):
    text = as_tables([*found, *runs("d256")], BASELINE)
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert "Autoencoder: d = 64, PSNR 24.6 dB on the training images, 23.4 dB held out." in text


def test_ablations_are_joined_under_the_names_of_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("faces", "photographs"):
        (tmp_path / name).mkdir()
        text = json.dumps({"runs": [asdict(run) for run in runs()]})
        (tmp_path / name / "ablation.json").write_text(text)
    folders = [str(tmp_path / "faces"), str(tmp_path / "photographs")]
    assert main(["ablate", "--join", *folders]) == 0
    said = capsys.readouterr().out
    assert "### All suites" in said
    assert "### faces, d64" in said
    older = [
        {name: value for name, value in asdict(run).items() if name not in ("latents", "autoencoder")} for run in runs()
    ]
    (tmp_path / "faces" / "ablation.json").write_text(json.dumps({"runs": older}))
    assert [run.suite for run in joined([tmp_path / "faces"])] == ["faces, d64"] * 4


@pytest.mark.parametrize("text", ["", "{}", '{"runs": [{"arm": "x"}]}', None])
def test_what_is_no_ablation_is_one_line(text: str | None, tmp_path: Path):
    if text is not None:
        (tmp_path / "ablation.json").write_text(text)
    with pytest.raises(UserError, match="no ablation in") as caught:
        joined([tmp_path])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="two folders are called"):
        joined([tmp_path, tmp_path])


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("config", [photographs(), on_folder(digits(), "photos"), digits()])
def test_a_suite_of_a_size_has_latents_of_that_size_and_keeps_all_else(d: int, config: TrainConfig):
    found = of_size(d)(config)
    autoencoder: Any = found.autoencoder
    halved = autoencoder.patch * 2 ** (len(autoencoder.block_out_channels) - 1)
    side = getattr(config.data, "resolution", 32) // halved
    assert autoencoder.latent_channels * side**2 == d
    assert side % found.network.patch == 0
    assert replace(found, autoencoder=config.autoencoder) == config


def test_a_suite_of_a_size_refuses_what_it_cannot_fit(tmp_path: Path):
    for change, message in (
        ({"autoencoder": PixelSpace()}, "leave out the store, or autoencoder="),
        ({"data": LatentStore(path="latents")}, "leave out the store"),
        ({"data": ImageFolder(path="photos", resolution=48)}, r"not 48: data\.resolution=32"),
        ({"data": ImageFolder(path="photos", resolution=8)}, "not 8"),
    ):
        with pytest.raises(UserError, match=message):
            of_size(256)(replace(photographs(), **change))
    assert main(["ablate", "photographs", "--suites", "d64", "--seconds", "5", f"--out={tmp_path}"]) == 2
    assert {f"d{d}" for d in SIZES} == {suite.name for suite in SUITES if suite.sized}
