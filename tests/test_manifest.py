"""Every figure says how it was measured, and figures that were measured otherwise share no table without a warning."""

from __future__ import annotations

import copy
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis import c_schedules, drawing
from reference_trainer.ablation.comparison import ONE, Result, as_markdown
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder, ImageSet, to_unit
from reference_trainer.data.latents import LatentSpace
from reference_trainer.evaluation import manifest as module
from reference_trainer.evaluation.evaluate import brief, evaluate
from reference_trainer.evaluation.features import Features, Imported, PooledLatents
from reference_trainer.evaluation.identity import Identity
from reference_trainer.evaluation.manifest import Manifest, code_version, in_words, manifest_of, unlike
from reference_trainer.evaluation.table import as_table
from reference_trainer.evaluation.training_set import TrainingSet
from reference_trainer.model import TrainedModel


class Untrained(torch.nn.Module):
    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return x


def small(n: int = 40, shade: int = 0) -> tuple[ImageSet, TrainedModel]:
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0, 0] = shade
    images = ImageSet("small", pixels, None, torch.arange(n) % 4 == 3)
    space = LatentSpace.of(PixelSpace().build(1, {}), to_unit(images.train))
    config = TrainConfig(clip=None, data=ImageFolder(path="small"))
    return images, TrainedModel(config, Untrained(), space, (1, 4, 4), 0, torch.device("cpu"))


def means(times: float = 1.0, **options: object) -> Imported:
    return Imported("means", lambda pixels: times * pixels.float().flatten(1)[:, :2], **options)


def made(
    features: Features | None = None, seed: int = 0, n: int = 5000, shade: int = 0, decay: float = 0.9
) -> Manifest:
    images, model = small(shade=shade)
    model = replace(model, config=replace(model.config, ema_decay=decay))
    return manifest_of(model, TrainingSet.of(images, seed, n), means() if features is None else features)


def test_what_makes_figures_differ_makes_their_manifests_differ_and_says_in_what():
    changes = {
        "reference.fingerprint": made(shade=9),
        "features.digest": made(means(2.0)),
        "features.kernel": made(means(scaled=False)),
        "samples.seed": made(seed=1),
        "samples.average": made(decay=0.99),
    }
    assert unlike({"a": made(), "b": made()}) == []
    for field, changed in changes.items():
        (line,) = unlike({"a": made(), "b": changed, "c": made()})
        assert line.startswith(f"{field}: ")
        assert line.endswith(" (b)")
        assert "(a, c); " in line
    resized = [made(means(identity=Identity("x", resize))) for resize in ("to 299 px", "to 224 px")]
    assert [line.partition(":")[0] for line in unlike({"a": resized[0], "b": resized[1]})] == ["features.resize"]
    assert [line.partition(":")[0] for line in unlike({"a": made(), "b": made(n=20)})] == ["reference.n", "samples.n"]


def test_samples_moved_to_the_moments_of_the_data_are_said_to_be_and_others_compare_with_earlier_versions():
    images, model = small()
    moved = evaluate(replace(model, moments={1: lambda x: x, 2: lambda x: x}), images, means())["manifest"]
    plain = evaluate(model, images, means())["manifest"]
    assert unlike({"a": plain, "b": moved}) == [f"samples.matched: {module.UNKNOWN} (a); True (b)"]
    assert "matched" not in plain["samples"]  # as files of earlier versions have it
    assert "moved to the moments of the data; version" in in_words(moved)


def test_a_folder_that_was_moved_and_a_network_of_another_name_compare():
    moved = made(replace(means(), name="another name"))
    moved["reference"]["name"] = "elsewhere"
    assert unlike({"a": made(), "b": moved}) == []


WHOLE = made()


@given(st.sampled_from(["reference", "features", "samples"]), st.text(), st.integers(0, 5))
def test_any_field_that_others_lack_is_said_in_a_line(part: str, value: str, count: int):
    other = copy.deepcopy(WHOLE)
    other[part]["new"] = value
    lines = unlike({f"run {i}": WHOLE for i in range(count)} | {"other": other})
    assert len(lines) == (count > 0)
    assert all(f"{part}.new: {module.UNKNOWN} (run 0" in line for line in lines)


def test_figures_of_a_version_without_manifests_are_named_beside_others_and_alone_pass():
    assert unlike({"a": None, "b": None}) == unlike({}) == []
    assert unlike({"a": None, "b": made(), "c": None, "d": None, "e": None}) == ["no manifest: a, c, d and 1 more"]


def test_an_evaluation_and_what_is_kept_of_it_carry_their_manifest():
    images, model = small()
    found = evaluate(model, images, means(), seed=3)
    manifest = found["manifest"]
    assert manifest == brief(found)["manifest"] == manifest_of(model, TrainingSet.of(images, 3), means())
    assert manifest["reference"] == {"name": "small", "fingerprint": images.fingerprint(), "n": 30}
    assert manifest["samples"] == {"n": 30, "seed": 3, "nfe": [1, 2], "average": "EMA, decay 0.99"}
    assert f"measured with: {in_words(manifest)}" in as_table(found).splitlines()
    assert all(word in in_words(manifest) for word in (images.fingerprint(), manifest["features"]["digest"], "seed 3"))


def test_features_that_fail_leave_the_manifest_without_a_digest_and_the_evaluation_whole():
    images, model = small()
    found = evaluate(model, images, Imported("fails", lambda pixels: 1 / 0))
    assert found["rows"] == {}
    assert found["manifest"]["features"]["digest"] is None
    assert as_table(found)


def test_the_autoencoders_own_features_are_known_by_its_weights_where_it_shows_any():
    class Weighted:
        def __init__(self, value: float) -> None:
            self.value = value

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def tensors(self) -> dict[str, torch.Tensor]:
            return {"w": torch.tensor(self.value)}

    digests = [made(PooledLatents(Weighted(v), torch.device("cpu")))["features"]["digest"] for v in (1.0, 1.0, 2.0)]
    assert digests[0] == digests[1] != digests[2]


def result(arm: str, manifest: Manifest | None, suite: str = "clean", failed: bool = False) -> Result:
    rows = {} if failed else {ONE: {"frechet": 3.0, "frechet_rec": 2.0}}
    return Result(suite=suite, arm=arm, seed=0, steps=10, seconds=1.0, rows=rows, manifest=manifest)


def test_a_table_of_an_ablation_warns_of_figures_that_were_not_measured_alike():
    alike = [result("x", made()), result("y", made()), result("z", made(means(2.0)), suite="other")]
    assert "Warning" not in as_markdown(alike, "x")
    assert "Warning" not in as_markdown([*alike, result("failed", None, failed=True)], "x")
    table = as_markdown([*alike, result("w", made(means(2.0)))], "x")
    assert table.count("**Warning: not measured alike") == 1  # the other suite is another table
    assert "(x, seed 0, y, seed 0); " in table
    assert "no manifest: w, seed 0." in as_markdown([*alike, result("w", None)], "x")


def test_runs_side_by_side_in_the_figure_of_schedules_warn_too():
    def run(name: str, manifest: Manifest) -> drawing.RunCurves:
        row = {"step": 1, "features": "means", "manifest": manifest, "rows": {}}
        return drawing.RunCurves(name, [], [], [], [row])

    lines = c_schedules.table({}, [run("a", made()), run("b", made(seed=1))])
    assert lines[-1] == "not measured alike: samples.seed: 0 (a); 1 (b)"
    assert "alike" not in c_schedules.table({}, [run("a", made()), run("b", made())])[-1]


def test_the_code_is_named_by_its_commit_in_a_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def seen_in(root: Path) -> str:
        monkeypatch.setattr(module, "__file__", str(root / "reference_trainer" / "evaluation" / "manifest.py"))
        code_version.cache_clear()
        return code_version()

    installed = tmp_path / "project" / "site-packages"
    installed.mkdir(parents=True)
    git = ["git", "-C", str(installed.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    try:
        assert seen_in(installed.parent) == f"{module.__version__} at {commit[:10]}"
        assert seen_in(installed) == seen_in(tmp_path) == module.__version__
    finally:
        code_version.cache_clear()
