"""A store gives back what was put in, in any order and from any shards; what does not fit is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference_trainer.data import statistics
from reference_trainer.data import store as store_module
from reference_trainer.data.index import COVARIANCE, INDEX, Index, is_store
from reference_trainer.data.latents import Changed, InMemory, Latents, some_of
from reference_trainer.data.moments import Moments
from reference_trainer.data.shards import DTYPES, layout_of, write_shard
from reference_trainer.data.store import Store, in_pieces
from reference_trainer.errors import UserError
from robustcm.tails import box_statistics_along

SHAPE = (2, 3, 4)
TYPES = st.sampled_from(list(DTYPES.values()))


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def extracted(root: Path, latents: Tensor, cuts: tuple[int, ...] = (), flips: Tensor | None = None) -> Path:
    """Shards as LightningDiT's extraction writes them, cut at ``cuts``; labels 0, 1, 2, 0, ..."""
    root.mkdir(exist_ok=True)
    labels = torch.arange(len(latents)) % 3
    for number, (start, end) in enumerate(pairwise((0, *sorted(cuts), len(latents)))):
        tensors = {"latents": latents[start:end].clone(), "labels": labels[start:end].clone()}
        tensors |= {} if flips is None else {"latents_flip": flips[start:end].clone()}
        save_file(tensors, root / f"latents_rank00_shard{number:03d}.safetensors")
    return root


def is_trained(n: int, every: int = 10) -> Tensor:
    return torch.arange(n) % every != every - 1


@given(
    n=st.integers(10, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    dtype=TYPES,
    flips=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_take_gives_the_slices_whatever_the_shards(n: int, cuts: list[int], dtype: torch.dtype, flips: bool, seed: int):
    latents, mirrored = noise(n).to(dtype), noise(n, seed=1).to(dtype)
    with TemporaryDirectory() as folder:
        root = extracted(Path(folder), latents, tuple(min(cut, n) for cut in cuts), mirrored if flips else None)
        store = Store.open(root)
        whole = latents[is_trained(n)].float()
        if flips:
            whole = torch.cat([whole, mirrored[is_trained(n)].float()])
        stored = store.latents("train", flips)
        assert len(stored) == len(whole)
        indices = torch.randint(len(whole), (25,), generator=torch.Generator().manual_seed(seed))
        taken = stored.take(indices)
        assert taken.dtype is torch.float32
        assert torch.equal(taken, whole[indices])
        held_out = store.latents("held_out")
        assert torch.equal(held_out.take(torch.arange(len(held_out))), latents[~is_trained(n)].float())
        labels, expected = store.labels_of("train", flips), (torch.arange(n) % 3)[is_trained(n)]
        assert labels is not None
        assert torch.equal(labels, expected.repeat(2) if flips else expected)


@given(cuts=st.lists(st.integers(0, 57), max_size=5), dtype=TYPES)
def test_mean_and_std_are_those_of_all_training_latents_from_any_sharding(cuts: list[int], dtype: torch.dtype):
    latents = noise(57).to(dtype)
    with TemporaryDirectory() as folder:
        found = Store.open(extracted(Path(folder), latents, tuple(cuts))).index.moments["latents"]
    std, mean = torch.std_mean(latents[is_trained(57)].double(), dim=(0, 2, 3))
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.std, std, rtol=1e-12, atol=1e-12)


def test_moments_far_from_zero_lose_no_digits_and_pass_through_json():
    values = noise(40).double() + 1e8
    parts = Moments.of(values[:13]).merged(Moments.of(values[13:13])).merged(Moments.of(values[13:]))
    again = Moments.from_dict(json.loads(json.dumps(parts.as_dict())))
    torch.testing.assert_close(again.std, values.std(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    assert torch.equal(again.mean, parts.mean)
    assert torch.equal(again.squares, parts.squares)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 latents in shards of 15, 0, 20 and 5, indexed."""
    root = extracted(tmp_path / "store", noise(40), (15, 15, 35), noise(40, seed=1))
    Store.open(root)
    return root


def test_shards_of_somebody_elses_get_an_index_once(root: Path):
    before = (root / INDEX).read_bytes()
    index = Index.read(root)
    assert (index.count, index.held_out, index.shape, index.classes) == (40, 4, SHAPE, 3)
    assert [shard.count for shard in index.shards] == [15, 0, 20, 5]
    assert index.autoencoder is None
    index.write(root)
    assert (root / INDEX).read_bytes() == before


def test_labels_that_are_all_the_same_are_none(tmp_path: Path):
    save_file({"latents": noise(20), "labels": torch.zeros(20, dtype=torch.long)}, tmp_path / "a.safetensors")
    assert Store.open(tmp_path).labels_of("train") is None


def test_memory_and_store_are_the_same_latents_to_whoever_takes(root: Path):
    stored, memory = Store.open(root).latents(), InMemory(noise(40)[is_trained(40)])

    def seen(latents: Latents) -> list[Tensor]:
        return [
            latents.take(torch.tensor([3, 0, 3])),
            some_of(latents, most=5),
            Changed(latents, torch.neg).take(torch.tensor([1])),
        ]

    assert stored.shape == memory.shape == SHAPE
    for ours, theirs in zip(seen(stored), seen(memory), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(some_of(memory, most=5), some_of(memory.values, most=5))


@pytest.mark.parametrize("index", [-1, 36])
def test_an_index_beyond_the_end_is_no_other_entry(root: Path, index: int):
    with pytest.raises(IndexError):
        Store.open(root).latents().take(torch.tensor([0, index]))


def test_nothing_is_taken_of_nothing(root: Path):
    assert Store.open(root).latents().take(torch.tensor([], dtype=torch.long)).shape == (0, *SHAPE)


def test_pieces_are_all_indices_in_order():
    assert torch.equal(torch.cat(list(in_pieces(25, 10))), torch.arange(25))


def test_the_same_shard_has_the_same_bytes(tmp_path: Path):
    tensors = {"latents": noise(3), "labels": torch.arange(3), "latents_flip": noise(3, 1)}
    digests = {write_shard(tmp_path / name, tensors, {"b": 1, "a": [1]}) for name in ("a", "b")}
    assert len(digests) == 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_a_store(root: Path, tmp_path: Path):
    assert is_store(root)
    (root / INDEX).unlink()
    assert is_store(root)
    save_file({"weights": noise(1)}, tmp_path / "model.safetensors")
    assert not is_store(tmp_path)
    (tmp_path / INDEX).write_text('{"format": "of somebody else"}')
    assert not is_store(tmp_path)
    assert not is_store(tmp_path / "nowhere")


# What is measured, and what is checked again


@given(cuts=st.lists(st.integers(0, 57), max_size=5), dtype=TYPES)
def test_boxes_and_eigenvalues_are_those_of_all_training_latents_from_any_sharding(cuts: list[int], dtype: torch.dtype):
    latents = noise(57).to(dtype)
    with TemporaryDirectory() as folder:
        store = Store.open(extracted(Path(folder), latents, tuple(cuts)))
        assert store.index.statistics is None
        found, covariance = store.statistics, store.covariance()
        assert Store.open(Path(folder)).index.statistics == found  # kept
    trained = latents[is_trained(57)].double()
    expected = torch.cov(trained.flatten(1).T)
    assert covariance is not None
    torch.testing.assert_close(covariance, expected, rtol=1e-10, atol=1e-10)
    values = torch.tensor(found["eigenvalues"], dtype=torch.float64)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(expected).flip(0), rtol=1e-9, atol=1e-9)
    assert found["covariance"]["shape"] == [24, 24]
    for box, exact in zip(found["boxes"], box_statistics_along(trained, 1), strict=True):
        near = 0.01 * (exact.max - exact.min)
        for name in ("q1", "median", "q3"):
            assert box[name] == pytest.approx(getattr(exact, name), abs=near)
        assert box["mean"] == pytest.approx(exact.mean, rel=1e-9)
        assert box["std"] == pytest.approx(exact.std, rel=1e-9)


def test_of_many_elements_there_are_boxes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "MOST_ELEMENTS", 23)
    store = Store.open(extracted(tmp_path / "store", noise(40)))
    assert store.covariance() is None
    assert store.statistics["eigenvalues"] is None
    assert store.statistics["left_out"] == "more than 23 elements: no eigenvalues and no covariance"
    assert len(store.statistics["boxes"]) == 2
    assert not (tmp_path / "store" / COVARIANCE).exists()


def test_a_store_that_cannot_be_written_is_measured_each_time(root: Path, monkeypatch: pytest.MonkeyPatch):
    expected = Store.open(root).statistics["boxes"]
    in_index(root, lambda index: index.update(statistics=None))

    def refuse(*_: object) -> None:
        raise UserError("read-only")

    monkeypatch.setattr("reference_trainer.data.index.save_tensors", refuse)
    assert Store.open(root).statistics == Store.open(root).statistics
    assert Store.open(root).statistics["boxes"] == expected
    assert Index.read(root).statistics is None


def test_a_shard_is_read_again_only_when_its_size_or_time_changes(root: Path, monkeypatch: pytest.MonkeyPatch):
    for file in root.glob("*.safetensors"):
        os.utime(file, (1e9, 1e9))
    read, plain = list[str](), store_module.sha256_of
    monkeypatch.setattr(store_module, "sha256_of", lambda file: (read.append(file.name), plain(file))[1])
    Store.open(root)
    assert len(read) == 4
    Store.open(root)
    assert len(read) == 4
    os.utime(shard(root, 2), (1e9, 1e9 + 1))
    Store.open(root)
    assert read[4:] == [shard(root, 2).name]
    with_byte_changed(shard(root, 3))
    with pytest.raises(UserError, match=r"shard003.*another sha256"):
        Store.open(root)
    in_index(root, lambda index: index["shards"][0].update(sha256="0" * 64))
    with pytest.raises(UserError, match=r"shard000.*another sha256"):
        Store.open(root)


def test_a_shard_just_written_is_not_taken_for_checked(root: Path):
    Store.open(root)
    assert not (root / "statistics" / "checked.json").exists()


# What does not fit


def shard(root: Path, number: int) -> Path:
    return root / f"latents_rank00_shard{number:03d}.safetensors"


def in_index(root: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((root / INDEX).read_text())
    change(index)
    (root / INDEX).write_text(json.dumps(index))


def with_byte_changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rewrite(root: Path, number: int = 2, **tensors: Tensor | None) -> None:
    """The shard with other tensors, and no index."""
    all_of = load_file(shard(root, number)) | tensors
    save_file({name: tensor for name, tensor in all_of.items() if tensor is not None}, shard(root, number))
    (root / INDEX).unlink()


def with_nan(values: Tensor) -> Tensor:
    values[7, 0, 0, 0] = float("nan")
    return values


BAD = {
    "a shard is missing": (lambda root: shard(root, 2).unlink(), "shard002.*missing.*put it back"),
    "a shard is cut": (
        lambda root: shard(root, 2).write_bytes(shard(root, 2).read_bytes()[:-9]),
        "cannot read.*shard002",
    ),
    "a shard is empty": (lambda root: shard(root, 0).write_bytes(b""), "cannot read.*shard000"),
    "one byte is another": (lambda root: with_byte_changed(shard(root, 3)), "shard003.*another sha256"),
    "a shard too many": (lambda root: save_file({"latents": noise(1)}, shard(root, 9)), "shard009.*not in its index"),
    "two shards in each other's place": (
        lambda root: (
            shard(root, 0).rename(root / "x"),
            shard(root, 3).rename(shard(root, 0)),
            (root / "x").rename(shard(root, 3)),
        ),
        r"shard000.*disagree: latents is F32 \[5, 2, 3, 4\], by the index F32 \[15",
    ),
    "a count of the index": (
        lambda root: in_index(root, lambda i: i["shards"][0].update(count=14)),
        "shard000.*disagree",
    ),
    "the dtype of the index": (lambda root: in_index(root, lambda i: i.update(dtype="F16")), "disagree.*F32.*F16"),
    "an unknown dtype": (lambda root: in_index(root, lambda i: i.update(dtype="I8")), "no index of latents"),
    "an index of the future": (lambda root: in_index(root, lambda i: i.update(version=2)), "of version 2, expected 1"),
    "an index without shape": (lambda root: in_index(root, lambda i: i.pop("shape")), "no index of latents .'shape'"),
    "an index cut short": (
        lambda root: (root / INDEX).write_text('{"format": "robustcm latents",'),
        "no index of latents",
    ),
    "fewer classes than labels": (
        lambda root: in_index(root, lambda i: i.update(classes=2)),
        "labels 0 to 2, expected 0 to 1",
    ),
    "no shards": (lambda root: [file.unlink() for file in root.iterdir()], "no latents at .*neither index.json nor"),
    "shards of two shapes": (
        lambda root: rewrite(root, latents=torch.zeros(20, 2, 3, 5)),
        r"shard002.*latents is F32 \[20, 2, 3, 5\], expected F32 \[20, 2, 3, 4\]",
    ),
    "shards of two dtypes": (lambda root: rewrite(root, latents=noise(20).half()), "shard002.*latents is F16"),
    "flips of some shards": (lambda root: rewrite(root, latents_flip=None), "shard002.*has no latents_flip"),
    "fewer flips than latents": (lambda root: rewrite(root, latents_flip=noise(19)), "shard002.*latents_flip is"),
    "labels of some shards": (lambda root: rewrite(root, labels=None), "shard002.*has no labels"),
    "latents that are no maps": (
        lambda root: rewrite(root, 0, latents=torch.zeros(15, 24)),
        "shard000.*no latents .n, ch",
    ),
    "latents that are whole numbers": (
        lambda root: rewrite(root, 0, latents=torch.zeros(15, *SHAPE, dtype=torch.int8)),
        "shard000.* has no latents .* of float32, float16, bfloat16",
    ),
    "no latents": (lambda root: rewrite(root, latents=None), "shard002.* has no latents"),
    "a latent that is NaN": (lambda root: rewrite(root, latents=with_nan(noise(20))), "shard002.*latents 7 is NaN"),
    "a mirrored one that is NaN": (
        lambda root: rewrite(root, latents_flip=with_nan(noise(20))),
        "latents_flip 7 is NaN",
    ),
    "a label below 0": (
        lambda root: rewrite(root, labels=torch.arange(20) - 1),
        "shard002.* has 20 labels from -1 on, up to 18, of 20 latents",
    ),
    "a label that is no class": (
        lambda root: rewrite(root, labels=torch.full((20,), 2**62)),
        f"up to {2**62}, of 20 latents, expected one each, 0 to 99999",
    ),
    "fewer labels than latents": (
        lambda root: rewrite(root, labels=torch.arange(19)),
        "shard002.* has 19 labels from 0 on, up to 18, of 20 latents",
    ),
    "an encode not finished": (
        lambda root: (write_shard(shard(root, 4), {"latents": noise(2)}, {}), (root / INDEX).unlink()),
        "not finished: run the encode command again",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=list(BAD))
def test_what_does_not_fit_is_refused_in_one_line(root: Path, spoil: Callable[[Path], object], message: str):
    spoil(root)
    with pytest.raises(UserError, match=message) as refused:
        Store.open(root).labels_of("train")
    assert "\n" not in str(refused.value)


def test_too_few_to_hold_one_out_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"9 latents at .*, need at least 10"):
        Store.open(extracted(tmp_path / "few", noise(9)))


def test_flips_that_are_not_there_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no latents_flip: leave data.flips=False"):
        Store.open(extracted(tmp_path / "plain", noise(20))).latents("train", flips=True)


def test_a_shard_that_goes_while_it_is_read_is_named(root: Path):
    latents = Store.open(root).latents()
    shard(root, 0).unlink()
    with pytest.raises(UserError, match=r"cannot read .*shard000.*No such file"):
        latents.take(torch.tensor([0]))
    shard(root, 0).write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard000.*become shorter"):
        latents.take(torch.tensor([0]))


def test_the_fingerprint_follows_shards_and_split(root: Path):
    before = Store.open(root).fingerprint()
    in_index(root, lambda index: index.update(held_out_every=5))
    split = Store.open(root).fingerprint()
    rewrite(root, latents=noise(20, seed=9))
    assert len({before, split, Store.open(root).fingerprint()}) == 3


def test_the_layout_is_where_the_numbers_are(root: Path):
    place = layout_of(shard(root, 3))["latents"]
    content = shard(root, 3).read_bytes()[place.start : place.start + 4 * 5 * 24]
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(5, *SHAPE), noise(40)[35:])
