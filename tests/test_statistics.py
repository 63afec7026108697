"""Statistics of features that come in parts are those of all at once; what is kept on disk is found by its content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance

from reference_trainer.config import TrainConfig
from reference_trainer.data import stored
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.images import ImageFolder, ImageSet, to_unit
from reference_trainer.data.latents import LatentSpace
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError
from reference_trainer.evaluation import evaluate as whole_evaluation
from reference_trainer.evaluation import reference, sets, training_set
from reference_trainer.evaluation.evaluate import evaluate
from reference_trainer.evaluation.features import Imported
from reference_trainer.evaluation.identity import Identity
from reference_trainer.evaluation.kept import Kept
from reference_trainer.evaluation.metrics import frechet_distance
from reference_trainer.evaluation.reference import gathered
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.training_set import TrainingSet
from reference_trainer.model import TrainedModel

CPU = torch.device("cpu")


def vectors(n: int, k: int = 3, seed: int = 0) -> torch.Tensor:
    return 2 + torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def same(a: Statistics, b: Statistics) -> bool:
    pairs = [(a.tensors()[name], b.tensors()[name]) for name in a.tensors()]
    return a.count == b.count and all(torch.equal(x, y) for x, y in pairs)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), held=st.integers(1, 12))
def test_how_features_are_cut_into_parts_changes_no_bit(sizes: list[int], held: int):
    whole = vectors(sum(sizes))
    assert same(Statistics.gathered(whole.split(sizes), held), Statistics.gathered([whole], held))


@given(n=st.integers(2, 40), held=st.integers(1, 50))
def test_moments_are_those_of_all_vectors_and_the_first_are_held(n: int, held: int):
    whole = vectors(n)
    found = Statistics.gathered([whole], held)
    assert torch.equal(found.some, whole[:held])
    torch.testing.assert_close(found.mean, whole.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, whole.double().T.cov(), rtol=1e-10, atol=1e-10)


@given(n=st.integers(1, 20), m=st.integers(1, 20), held=st.integers(1, 25))
def test_statistics_merge_to_those_of_both_sets(n: int, m: int, held: int):
    a, b = vectors(n), vectors(m, seed=1)
    merged = Statistics.gathered([a], held).merged(Statistics.gathered([b], held), held)
    both = Statistics.gathered([torch.cat([a, b])], held)
    assert merged.count == n + m
    assert torch.equal(merged.some, both.some)
    torch.testing.assert_close(merged.total, both.total)
    torch.testing.assert_close(merged.products, both.products)


@pytest.mark.parametrize("held", [5000, 70])
def test_frechet_distance_in_parts_is_that_of_torchmetrics_which_holds_all_to_the_last_digit_in_one_block(held: int):
    real, fake = vectors(300), 1.5 * vectors(200, seed=1)
    metric = FrechetInceptionDistance(feature=Flat())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    found = frechet_distance(*(Statistics.gathered(part.split(64), held) for part in (real, fake)))
    assert found == float(metric.compute()) if held == 5000 else found == pytest.approx(float(metric.compute()))


class Flat(torch.nn.Module):
    num_features = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_features_that_are_not_finite_are_refused_in_whichever_batch_they_come():
    features = Imported("odd", lambda pixels: pixels.float().flatten(1).log())  # of a black pixel -inf
    batches = [torch.ones(4, 1, 1, 1, dtype=torch.uint8), torch.zeros(3, 1, 1, 1, dtype=torch.uint8)]
    with pytest.raises(UserError, match="3 of 3 images have NaN or infinite features: odd"):
        gathered(features, batches)


class Untrained(torch.nn.Module):
    """Returns the noise it is given."""

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return x


def many(n: int = 351) -> tuple[ImageSet, TrainedModel]:
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet("many", pixels, None, torch.arange(n) % 13 == 12)
    space = LatentSpace.of(PixelSpace().build(1, {}), to_unit(images.train))
    config = TrainConfig(clip=None, data=ImageFolder(path="many"))
    return images, TrainedModel(config, Untrained(), space, (1, 4, 4), 0, CPU)


class Counted:
    """Three features of an image, and how many images were looked at, at most how many at once."""

    def __init__(self) -> None:
        self.seen, self.most = 0, 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        self.most = max(self.most, len(pixels))
        return pixels.float().flatten(1)[:, :3]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 324 training images only 250 are held at a time."""
    for module in (training_set, sets, whole_evaluation):
        monkeypatch.setattr(module, "MAX_IMAGES", 250)
    for module in (training_set, reference):
        monkeypatch.setattr(module, "BATCH", 50)


def test_an_evaluation_batch_by_batch_is_that_in_memory(request: pytest.FixtureRequest):
    images, model = many()
    features = Imported("three", Counted())
    whole = evaluate(model, images, features, bounds=False)
    request.getfixturevalue("small_memory")
    streamed = evaluate(model, images, features, bounds=False, n=5000)
    assert streamed["rows"] == whole["rows"]
    assert streamed["rows"]["1 evaluation"]["n"] == 324
    assert streamed["manifest"] == whole["manifest"]
    assert streamed["latents"]["rows"]["1 evaluation"]["n"] == 250  # these alone are held


@pytest.mark.usefixtures("small_memory")
def test_fewer_samples_are_as_many_on_both_sides_and_rows_that_bound_are_of_those_in_memory():
    images, model = many()
    found = evaluate(model, images, Imported("three", Counted()), n=300)
    n = {name: row["n"] for name, row in found["rows"].items()}
    assert [n["1 evaluation"], n["reconstructions"], n["bound: Gaussian latents decoded"]] == [300, 300, 250]
    assert found["manifest"]["reference"]["n"] == found["manifest"]["samples"]["n"] == 300
    assert evaluate(model, images, Imported("three", Counted()), n=20, bounds=False)["rows"]["1 evaluation"]["n"] == 20


@pytest.mark.usefixtures("small_memory")
def test_the_training_images_behind_the_first_are_the_rest_of_one_shuffle():
    images, _ = many()
    train = TrainingSet.of(images, seed=3, n=310)
    all_of_them = torch.cat([train.first, *train.rest()])
    order = torch.randperm(324, generator=torch.Generator().manual_seed(3))[:310]
    assert torch.equal(all_of_them, images.train[order])
    assert [len(part) for part in train.rest()] == [50, 10]


def test_images_of_a_store_that_were_not_decoded_come_as_they_are_needed(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = ImageFolder(path=str(image_folder), resolution=16)
    encode_folder(Encoding(source=source, autoencoder=PixelSpace(), shard=15), tmp_path / "store", CPU, tmp_path)
    monkeypatch.setattr(stored, "some_indices", lambda n, *_: torch.randperm(n, generator=torch.Generator())[:10])
    images = LatentStore(path=str(tmp_path / "store")).decoded(PixelSpace(), CPU)
    assert len(images.train) == 10
    train = TrainingSet.of(images, seed=1, n=30)
    assert (len(train.first), train.count, TrainingSet.of(images, seed=1).count) == (10, 30, 36)
    seen = torch.cat([train.first, *train.rest()]).flatten(1)
    there = source.load().train.flatten(1)
    assert sorted((seen[:, None] == there).all(2).sum(1).tolist()) == [1] * 30  # each is one of the training images
    assert len(seen.unique(dim=0)) == 30  # and none comes twice


def kept(folder: Path, features: Imported, **changed: object) -> Kept:
    return Kept.of(folder, replace(TrainingSet.of(many()[0], seed=0), **changed), features)


@pytest.mark.usefixtures("small_memory")
def test_a_second_evaluation_finds_the_reference_of_the_first(tmp_path: Path):
    (images, model), counted = many(), Counted()
    features = Imported("three", counted)
    first = evaluate(model, images, features, bounds=False, n=324, cache=tmp_path)
    once, counted.seen = counted.seen, 0
    assert evaluate(model, images, features, bounds=False, n=324, cache=tmp_path) == first
    assert once - counted.seen == 324 + 74  # images; and reconstructions, but for the first 250
    assert first == evaluate(model, images, features, bounds=False, n=324)


def other(function: Callable[[torch.Tensor], torch.Tensor]) -> Imported:
    return Imported("three", function)


def test_statistics_are_found_by_content_and_not_for_another(tmp_path: Path):
    images, _ = many()
    features = Imported("three", Counted())
    key = kept(tmp_path, features).key
    assert kept(tmp_path, replace(features, name="another name", function=Counted())).key == key
    pixels = images.pixels.clone()
    pixels[-1, 0, 0, 0] ^= 1  # one bit of an image that is held out or not among the first
    different = [
        kept(tmp_path, other(lambda pixels: 2 * Counted()(pixels))),
        kept(tmp_path, replace(features, identity=Identity("a"))),
        kept(tmp_path, replace(features, identity=Identity("b"))),
        kept(tmp_path, replace(features, identity=Identity("a", "another resize"))),
        kept(tmp_path, features, images=replace(images, pixels=pixels)),
        kept(tmp_path, features, count=100),
        kept(tmp_path, features, seed=1),
        kept(tmp_path, features).also(torch.zeros(1)),
        kept(tmp_path, features).also(torch.ones(1)),
    ]
    assert len({key, *(found.key for found in different)}) == 1 + len(different)


def fails() -> Statistics:
    raise AssertionError("computed again")


def test_what_is_kept_is_read_back_to_the_bit_and_computed_again_where_it_is_damaged_or_anothers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made, where = Statistics.of(vectors(20)), Kept(tmp_path, "ab" * 32)
    where.once(lambda: made)
    assert same(where.once(fails), made)
    (file,) = tmp_path.iterdir()
    fresh = Statistics.of(vectors(20, seed=1))
    assert same(Kept(tmp_path, "ab" * 31 + "cd").once(lambda: fresh), fresh)  # of a key with the same beginning
    file.write_bytes(file.read_bytes()[:-5])
    assert same(where.once(lambda: made), made)
    assert "computing the reference's features again" in capsys.readouterr().out
    assert same(where.once(fails), made)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_kept(value: float, tmp_path: Path):
    spoiled = Statistics.of(torch.full((3, 2), value))
    Kept(tmp_path, "ab" * 32).once(lambda: spoiled)
    assert not list(tmp_path.iterdir())
