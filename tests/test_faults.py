"""What happens to the machine loses no work and changes no result: SIGTERM, disks, folders, clocks."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from reference_trainer.__main__ import main
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.store import Store
from reference_trainer.errors import AGAIN, UserError
from reference_trainer.evaluation.evaluate import Evaluator
from reference_trainer.files import save_tensors
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches
from robustcm.objective import Batch

NETWORK = "network=DiT(width=8,layers=1,heads=2,patch=8)"
OPTIONS = [
    "pixels",
    NETWORK,
    "clip=None",
    "steps=6",
    "batch_size=4",
    "data.resolution=16",
    "save_every=2",
    "log_every=4",
    "--brief",
]


@pytest.fixture
def command(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains in the folder of a name, as the command line does; returns the exit status."""
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))

    def run(name: str, *more: str) -> int:
        return main(["train", "--device=cpu", f"--run={tmp_path / name}", f"--data={image_folder}", *OPTIONS, *more])

    return run


def assert_same_ends(one: Path, two: Path) -> None:
    (step, tensors), (also, others) = (RunFolder(root).latest_checkpoint() for root in (one, two))
    assert step == also == 6
    assert tensors.keys() == others.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert RunFolder(one).evaluations() == RunFolder(two).evaluations()
    rows = [[row | {"seconds": 0} for row in RunFolder(root).metrics()] for root in (one, two)]
    assert rows[0] == rows[1]


def at_step(step: int, happens: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """``happens`` once, before the step behind ``step`` steps."""
    left = [step]

    class Disturbed(Batches):
        def __call__(self, asked: int, part: int = 0) -> Batch:
            if asked in left:
                left.clear()
                happens()
            return super().__call__(asked, part)

    patch.setattr(loop, "Batches", Disturbed)


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
def test_sigterm_saves_says_again_and_the_rest_is_as_if_nothing_had_happened(
    times: int, command, tmp_path: Path, monkeypatch, capsys
):
    assert command("whole") == 0
    at_step(2, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(times)], monkeypatch)
    assert command("stopped") == AGAIN == 75
    assert RunFolder(tmp_path / "stopped").latest_checkpoint()[0] == 3
    assert "stopped after step 3 and saved in" in capsys.readouterr().err
    assert command("stopped") == 0
    assert_same_ends(tmp_path / "whole", tmp_path / "stopped")


def test_ctrl_c_has_a_status_of_its_own(command, monkeypatch):
    at_step(2, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    assert command("stopped") == 130


def test_sigterm_before_the_first_step_says_again(command, monkeypatch, capsys):
    monkeypatch.setattr(PixelSpace, "fit", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert command("stopped") == AGAIN
    assert capsys.readouterr().err.endswith("terminated; run the same command again to continue\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("when", ["before", "amid"])
def test_sigterm_does_not_wait_for_an_evaluation_which_is_made_up_for(when: str, command, tmp_path: Path, monkeypatch):
    assert command("whole", "evaluate_every=3") == 0
    with monkeypatch.context() as patch:
        if when == "before":
            at_step(2, lambda: signal.raise_signal(signal.SIGTERM), patch)
            patch.setattr(Evaluator, "__call__", lambda *_: pytest.fail("evaluated before saving"))
        else:
            patch.setattr(
                Evaluator, "__call__", lambda *_: (signal.raise_signal(signal.SIGTERM), pytest.fail("went on"))
            )
        assert command("stopped", "evaluate_every=3") == AGAIN
    assert RunFolder(tmp_path / "stopped").latest_checkpoint()[0] == 3
    assert command("stopped", "evaluate_every=3") == 0
    assert_same_ends(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_stop_while_an_evaluation_is_made_up_for_does_not_lose_it(command, tmp_path: Path, monkeypatch):
    assert command("whole", "evaluate_every=3") == 0
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "__call__", lambda *_: signal.raise_signal(signal.SIGTERM))
            assert command("stopped", "evaluate_every=3") == AGAIN
        assert RunFolder(tmp_path / "stopped").latest_checkpoint()[0] == 3
    assert command("stopped", "evaluate_every=3") == 0
    assert_same_ends(tmp_path / "whole", tmp_path / "stopped")


def test_an_evaluation_is_not_begun_when_a_stop_came_while_its_checkpoint_was_written(command, tmp_path, monkeypatch):
    save = RunFolder.save_checkpoint

    def stopped(*given: object) -> None:
        save(*given)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "save_checkpoint", stopped)
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: pytest.fail("evaluated"))
    assert command("stopped", "evaluate_every=3", "save_every=100") == AGAIN
    assert RunFolder(tmp_path / "stopped").latest_checkpoint()[0] == 3


def test_ctrl_c_in_the_last_step_ends_before_the_evaluation_which_the_next_start_makes(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(5, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert command("stopped") == 130
    run = RunFolder(tmp_path / "stopped")
    assert run.latest_checkpoint()[0] == 6
    assert run.evaluations() == []
    assert command("stopped") == 0
    assert [row["step"] for row in run.evaluations()] == [6]


# --- Disks and folders -----------------------------------------------------------------------------------------------


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The kernel refuses to write beyond ``size`` bytes, in the middle of a write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fails", ["add_scalar", "close"])
def test_a_disk_full_under_tensorboard_is_said_in_a_line(fails: str, command, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, fails, full)
    assert command("full") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cannot write ")
    assert error.endswith("tensorboard: No space left on device")


def test_a_disk_full_in_the_middle_of_a_save_costs_the_steps_since_the_last(
    command, tmp_path: Path, monkeypatch, capsys
):
    assert command("whole") == 0
    stopped = RunFolder(tmp_path / "stopped")
    limits = []
    at_step(2, lambda: (limits.append(no_file_above(60_000)), limits[0].__enter__()), monkeypatch)
    try:
        assert command("stopped") == 2
    finally:
        limits[0].__exit__(None, None, None)
    assert "File too large" in capsys.readouterr().err.splitlines()[-1]
    assert [file.name for file in (stopped.root / "checkpoints").iterdir()] == ["step_00000002.safetensors"]
    assert command("stopped") == 0
    assert_same_ends(tmp_path / "whole", stopped.root)


@pytest.mark.parametrize(("log_every", "said"), [(100, "{run} has vanished"), (1, "cannot write {run}/metrics.jsonl")])
def test_a_run_folder_that_vanishes_ends_the_run_and_leaves_no_torso(
    log_every: int, said: str, command, tmp_path: Path, monkeypatch, capsys
):
    at_step(2, lambda: shutil.rmtree(tmp_path / "run"), monkeypatch)
    assert command("run", f"log_every={log_every}") == 2
    assert said.format(run=tmp_path / "run") in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_start_in_a_folder_is_refused_and_the_first_does_not_notice(
    command, tmp_path: Path, monkeypatch, capsys
):
    assert command("whole") == 0
    second = []
    at_step(3, lambda: second.append(command("run")), monkeypatch)
    assert command("run") == 0
    assert second == [2]
    assert f"another process is training in {tmp_path / 'run'}" in capsys.readouterr().err
    assert_same_ends(tmp_path / "whole", tmp_path / "run")


def test_latents_that_changed_between_two_starts_are_refused_and_nothing_is_touched(
    image_folder: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    store, run = tmp_path / "store", tmp_path / "run"
    encode = ["encode", str(image_folder), f"--out={store}", "--autoencoder=PixelSpace", "--resolution=16"]
    train = ["train", f"--data={store}", f"--out={run}", *(word for word in OPTIONS if not word.startswith("data."))]
    assert main(encode) == main(train) == 0
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    shutil.rmtree(store)
    (image_folder / "07.png").unlink()
    assert main(encode) == 0
    assert main(train) == 2
    assert f"{run} was made from something else" in capsys.readouterr().err.splitlines()[-1]
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_a_run_folder_that_cannot_be_written_is_said_before_anything_else(tmp_path: Path, command, capsys):
    (tmp_path / "file").touch()
    assert command("file/run") == 2
    assert "cannot write to" in capsys.readouterr().err


def test_what_a_killed_save_left_is_removed_by_the_next_start(command, tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    left = [run.root / "checkpoints" / ".step_00000002.safetensors.123.tmp", run.root / ".config.json.123.tmp"]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    assert command("run") == 0
    assert not any(file.exists() for file in left)


# --- Clocks ----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(command, tmp_path: Path, monkeypatch):
    assert command("whole") == 0
    hours = iter(range(10**6, 0, -1))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 3600.0 * next(hours))
        at_step(3, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert command("jumped") == AGAIN
        patch.setattr(loop, "Batches", Batches)
        assert command("jumped") == 0
    assert_same_ends(tmp_path / "whole", tmp_path / "jumped")
    assert all(0 <= row["seconds"] < 600 for row in RunFolder(tmp_path / "jumped").metrics())


@pytest.mark.parametrize("now", [0.0, 2e9, 1e11])
def test_a_shard_that_changed_is_seen_whatever_the_clock_says(now: float, tmp_path: Path, monkeypatch):
    shard = tmp_path / "x.safetensors"
    save_file({"latents": torch.randn(12, 1, 2, 2)}, shard)
    os.utime(shard, (1e9, 1e9))
    monkeypatch.setattr(time, "time", lambda: now)
    for _ in range(2):
        Store.open(tmp_path)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="another sha256"):
        Store.open(tmp_path)


# --- Memory ----------------------------------------------------------------------------------------------------------


def peak_kib() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def test_saving_holds_no_second_copy(tmp_path: Path):
    tensors = {f"{i}": torch.ones(2**20) for i in range(16)}  # 64 MiB
    save_tensors(tmp_path / "warm.safetensors", {"x": torch.ones(1)}, {})
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = peak_kib()
    save_tensors(tmp_path / "x.safetensors", tensors, {})
    assert peak_kib() - before < 20 * 1024
