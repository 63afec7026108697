"""torchrun starts the trainer twice, and what it shows and writes is what one process does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import two_runs

from reference_trainer import ranks
from reference_trainer.__main__ import main
from reference_trainer.errors import Terminated, UserError
from reference_trainer.ranks import following
from reference_trainer.run import RunFolder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TINY = ["pixels", "batch_size=8", "micro_batches=2", "data.resolution=16", "objective.gate=Above(1)", "log_every=2"]
TINY += ["network=DiT(width=8,layers=1,heads=2,patch=16)", "--device=cpu", "--brief"]
STEPS = 100_000


@pytest.fixture
def torchrun(image_folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Two processes that train ``whole``, evaluate it and then train ``stopped``.

    When a test fails they are ended, with their children.
    """
    words = ["train", *TINY, f"--data={image_folder}"]
    whole = [*words, "steps=4", f"--out={tmp_path / 'whole'}"]
    stopped = [*words, f"steps={STEPS}", "save_every=5", f"--out={tmp_path / 'stopped'}"]
    judged = ["evaluate", str(tmp_path / "whole"), "--samples=20", "--device=cpu"]
    command = [*TORCHRUN, two_runs.__file__, *whole, two_runs.THEN, *judged, two_runs.THEN, *stopped]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(60)


def test_two_processes_write_and_print_once_and_sigterm_saves(torchrun: subprocess.Popen[str], tmp_path: Path):
    """The one slow test of torchrun itself, so all facts of one start."""
    run = RunFolder(tmp_path / "stopped")
    until = time.monotonic() + 400
    while not run.checkpoints() and time.monotonic() < until and torchrun.poll() is None:
        time.sleep(0.05)
    torchrun.send_signal(signal.SIGTERM)
    out, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0

    assert err.count(two_runs.THEN) == 2, err
    of_whole, _, of_stopped = err.split(two_runs.THEN)
    assert out.count("measured with:") == 2
    assert of_whole.count("training:   0%") == of_whole.count("training: 100%") == 1, err
    whole = RunFolder(tmp_path / "whole")
    assert [row["step"] for row in whole.metrics()] == [2, 4]
    assert [row["rows"]["2 evaluations"]["n"] for row in whole.evaluations()] == [36]
    assert json.loads((whole.root / "evaluation.json").read_text())["rows"]["2 evaluations"]["n"] == 20
    assert out.count("look at") == 1  # by --brief not
    assert [file.name for file in whole.checkpoints()] == ["step_00000004.safetensors"]

    assert of_stopped.count("and saved in") == 1, err
    step = int(of_stopped.partition("stopped after step ")[2].split()[0])
    assert (found := run.latest_checkpoint()) is not None
    assert found[0] == step < STEPS


def test_a_mistake_is_said_by_the_leading_process_while_the_others_wait(monkeypatch: pytest.MonkeyPatch):
    """torchrun ends them meanwhile."""

    def mistake() -> int:
        raise UserError("what all of them find")

    def ended(seconds: float) -> None:
        assert seconds == ranks.HEAD_START
        raise Terminated

    monkeypatch.setattr(ranks.time, "sleep", ended)
    with pytest.raises(Terminated):
        following(mistake)


def test_a_mistake_of_one_process_alone_is_said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(ranks, "HEAD_START", 0.0)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back behind the test, as is what follows
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "stepz=3"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_what_needs_one_process_is_done_by_one_or_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ablate", "--steps=1", f"--out={tmp_path / 'out'}"]) == 2
    assert "leave torchrun out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setenv("RANK", "1")
    assert main(["sample", str(tmp_path / "no run")]) == 0
    assert list(tmp_path.iterdir()) == []
