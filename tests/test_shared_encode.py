"""Several processes write one store between them, killed or not, and its bytes are those of a single one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from reference_trainer import files as trainer_files
from reference_trainer.data import claims as claims_module
from reference_trainer.data import encode as encoding_module
from reference_trainer.data.autoencoders import KLAutoencoder, PretrainedAutoencoder
from reference_trainer.data.claims import Claims
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.gathered import GATHERED, Gathered
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.index import COVARIANCE, Index
from reference_trainer.data.shards import sha256_of
from reference_trainer.data.store import Store
from reference_trainer.errors import UserError

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")  # torch is imported already
FITTED = KLAutoencoder(latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, steps=2, batch_size=4)
OWN = PretrainedAutoencoder(load="test_shared_encode:load")


class Thumb:
    """The mean of every 4 x 4 pixels."""

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 4)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(latents, scale_factor=4)


def load() -> Thumb:
    return Thumb()


def encode(folder: Path, out: Path, autoencoder: KLAutoencoder | PretrainedAutoencoder = OWN) -> Index:
    encoding = Encoding(source=ImageFolder(path=str(folder), resolution=16), autoencoder=autoencoder, shard=4)
    return encode_folder(replace(encoding, flips=True), out, CPU, out.with_name("cache"))


def content(out: Path) -> dict[str, str]:
    """The sha256 of each file."""
    return {file.relative_to(out).as_posix(): sha256_of(file) for file in out.rglob("*") if file.is_file()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "PAUSE", 0.01)


@pytest.mark.parametrize("autoencoder", [OWN, FITTED], ids=["own", "fitted"])
def test_two_processes_write_each_shard_once_and_the_bytes_of_one(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoencoder: KLAutoencoder
):
    (image_folder / "05.png").write_bytes(b"no image")  # shards of two sizes: entries are counted in their order
    encode(image_folder, tmp_path / "whole", autoencoder)
    write = encoding_module.write_shard
    written, both_have_one, waited = FORK.SimpleQueue(), FORK.Barrier(2), list[bool]()

    def noted(file: Path, tensors: dict[str, Tensor], about: dict) -> str:
        if not waited:  # with its first shard in hand: so however fast one of them is, the other has some, too
            waited.append(True)
            both_have_one.wait(60)
        written.put((os.getpid(), file.name))
        return write(file, tensors, about)

    monkeypatch.setattr(encoding_module, "write_shard", noted)
    both = [
        FORK.Process(target=encode, args=(image_folder, tmp_path / "shared", autoencoder), daemon=True)
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    found = list[tuple[int, str]]()
    while not written.empty():
        found.append(written.get())
    assert sorted(name for _, name in found) == [f"latents_rank00_shard{i:03d}.safetensors" for i in range(10)]
    assert len({process for process, _ in found}) == 2
    assert content(tmp_path / "shared") == content(tmp_path / "whole")


def stuck_in_its_second_shard(folder: Path, out: Path, stuck: Event) -> None:
    """What a process does that is to be killed: write a shard, claim another, and say so."""
    write, written = encoding_module.write_shard, list[Path]()

    def once(file: Path, tensors: dict[str, Tensor], about: dict) -> str:
        if written:
            stuck.set()
            signal.pause()
        written.append(file)
        return write(file, tensors, about)

    encoding_module.write_shard = once
    encode(folder, out)


def test_what_a_killed_process_worked_at_is_taken_over(image_folder: Path, tmp_path: Path):
    encode(image_folder, tmp_path / "whole")
    out, stuck = tmp_path / "shared", FORK.Event()
    process = FORK.Process(target=stuck_in_its_second_shard, args=(image_folder, out, stuck), daemon=True)
    process.start()
    assert stuck.wait(60)
    other = threading.Thread(target=encode, args=(image_folder, out), daemon=True)
    other.start()  # beside it, before it is killed
    deadline = time.monotonic() + 60
    while len(list(out.glob("latents_*.safetensors"))) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not (out / "latents_rank00_shard001.safetensors").exists()
    assert other.is_alive()  # it waits for that one
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    other.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert content(out) == content(tmp_path / "whole")


def test_where_nothing_can_be_locked_one_process_writes_the_store_and_says_to_start_no_second(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    encode(image_folder, tmp_path / "whole")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    waiting = SimpleNamespace(sleep=lambda _: pytest.fail("it waits for another process"))
    monkeypatch.setattr(claims_module, "time", waiting)
    monkeypatch.setattr(claims_module.fcntl, "flock", refuse)
    encode(image_folder, tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert "cannot be locked (No locks available): start no second process in it" in capsys.readouterr().out


def test_a_claim_is_of_one_and_free_again_behind_it(tmp_path: Path):
    claims = Claims(tmp_path / "claims")
    with claims.held("a", wait=False) as first, claims.held("a", wait=False) as second, claims.held("b") as other:
        assert (first, second, other) == (True, False, True)
    with claims.held("a", wait=False) as again:
        assert again


def test_a_shard_that_another_is_at_comes_last(tmp_path: Path):
    files, claims = [tmp_path / name for name in ("a", "b", "c")], Claims(tmp_path / "claims")
    seen = []
    with claims.held("a"):
        files[1].touch()
        shared = claims.shared(files)
        for _ in range(2):
            file, ours = next(shared)
            seen.append((file.name, ours))
            file.touch()
    seen += [(file.name, ours) for file, ours in shared]
    assert seen == [("b", False), ("c", True), ("a", True)]


def test_a_resumed_encode_reads_no_shard_again(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encode(image_folder, tmp_path / "whole")
    write, number = encoding_module.write_shard, iter(range(100))

    def stops(file: Path, tensors: dict[str, Tensor], about: dict) -> str:
        if next(number) == 6:
            raise KeyboardInterrupt
        return write(file, tensors, about)

    with monkeypatch.context() as patched:
        patched.setattr(encoding_module, "write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            encode(image_folder, tmp_path / "store")
    read, plain = list[Path](), Gathered.with_shard

    def noted(self: Gathered, file: Path, held_out_every: int) -> Gathered:
        read.append(file)
        return plain(self, file, held_out_every)

    monkeypatch.setattr(Gathered, "with_shard", noted)
    encode(image_folder, tmp_path / "store")
    assert [file.name[-15:-12] for file in read] == ["006", "007", "008", "009"]
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"half")])
def test_what_was_gathered_can_be_lost(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object
):
    encode(image_folder, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(Index, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            encode(image_folder, tmp_path / "store")
    spoil(tmp_path / "store" / GATHERED)  # type: ignore[operator]
    encode(image_folder, tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "whole")


class Filling:
    """A file of a disk that has room for ``left`` bytes."""

    def __init__(self, opened: IO[bytes], left: int) -> None:
        self.opened, self.left = opened, left

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()

    def write(self, content: bytes) -> None:
        self.opened.write(content[: self.left])
        self.opened.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["shard002.safetensors", "gathered.safetensors", "codec.safetensors", "covariance"])
def test_a_disk_that_fills_in_the_middle_of_a_file_leaves_whole_ones(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
):
    encode(image_folder, tmp_path / "whole")
    out, plain = tmp_path / "store", Path.open

    def filling(self: Path, mode: str = "r", *arguments: object, **named: object) -> object:
        opened = plain(self, mode, *arguments, **named)  # type: ignore[call-overload]
        return Filling(opened, 100) if mode == "wb" and at in self.name else opened

    def saving(tensors: object, filename: Path, *arguments: object) -> None:
        if at not in filename.name:
            return save_file(tensors, filename, *arguments)  # type: ignore[arg-type]
        filename.write_bytes(bytes(100))
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", filling)
        patched.setattr(trainer_files, "save_file", saving)
        with pytest.raises(UserError, match=rf"{at}.*No space left on device.*run the same command again") as refused:
            encode(image_folder, out)
    assert "\n" not in str(refused.value)
    assert not (out / "index.json").exists()
    assert not [name for name in content(out) if name.endswith(".tmp")]
    whole = content(tmp_path / "whole")
    shards = {name: data for name, data in content(out).items() if name.startswith("latents")}
    assert shards == {name: whole[name] for name in shards}
    encode(image_folder, out)
    assert content(out) == whole


def test_the_index_has_boxes_and_eigenvalues_of_the_training_entries(image_folder: Path, tmp_path: Path):
    index = encode(image_folder, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    latents = store.latents().take(torch.arange(36)).double()
    assert index.statistics is not None
    assert index.statistics == store.statistics
    expected = torch.cov(latents.flatten(1).T)
    found = store.covariance()
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    values = torch.tensor(index.statistics["eigenvalues"], dtype=torch.float64)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(expected).flip(0).clamp(min=0), rtol=1e-8, atol=1e-12)
    about = index.statistics["covariance"]
    assert (about["shape"], about["bytes"]) == ([48, 48], (tmp_path / "store" / COVARIANCE).stat().st_size)
    for channel, box in enumerate(index.statistics["boxes"]):
        assert box["median"] == pytest.approx(float(latents[:, channel].median()), abs=0.05)
        assert box["count"] == 36 * 16
