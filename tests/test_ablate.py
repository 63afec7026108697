"""The ladder runs, goes on where it stopped, passes signals on, and says what failed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, NoReturn, TextIO

import pytest
import torch
from of_diffusers import saved

from reference_trainer.__main__ import main
from reference_trainer.ablation import ablate, budget
from reference_trainer.ablation.ablate import jobs_of, training_seconds
from reference_trainer.ablation.comparison import ONE, TWO
from reference_trainer.ablation.ladder import ARMS, BASELINE, SUITES, Arm
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.images import ImageFolder
from reference_trainer.errors import UserError
from reference_trainer.loading import Place
from reference_trainer.presets import digits
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import Batches
from reference_trainer.words import NAMES
from robustcm.gates import Above
from robustcm.objective import Batch

CPU = torch.device("cpu")

THERE = ", ".join(NAMES)
TINY = [
    *("data=ImageFolder(path={folder}, resolution=16)", "autoencoder=PixelSpace", "batch_size=8", "coupling_pool=2"),
    "network=UNet(block_out_channels=(8,), attention=(False,), norm_num_groups=4)",
]


@pytest.fixture
def command(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    options = [option.format(folder=repr(str(image_folder))) for option in TINY]
    return ["ablate", "--device=cpu", f"--out={tmp_path / 'out'}", "--workers=2", *options]


class InThisProcess:
    """A training process that is none: starting Python and torch takes longer than these runs."""

    def __init__(self, command: list[str], *, stdout: TextIO, **_: object) -> None:
        assert command[:3] == [sys.executable, "-m", "reference_trainer"]
        with redirect_stdout(stdout), redirect_stderr(stdout):
            self.returncode = main(command[3:])

    def wait(self) -> int:
        return self.returncode


class AtOnce(Executor):
    """Does everything as it is asked for, in the thread that asks: only the first may take Ctrl-C, as training does."""

    def __init__(self, workers: int) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def train_here(patch: pytest.MonkeyPatch, training: type = InThisProcess) -> None:
    patch.setattr(ablate, "subprocess", SimpleNamespace(Popen=training))  # and nobody else's
    patch.setattr(ablate, "ThreadPoolExecutor", AtOnce)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    train_here(monkeypatch)


class Ladder(NamedTuple):
    """Two arms and two seeds, run to their table; to be looked at or copied."""

    images: Path
    out: Path
    printed: str
    words: list[str]
    """Without ``--seeds`` and ``--out``."""

    def again(self, *more: str, out: Path | None = None, seeds: Sequence[int] = (0, 1)) -> int:
        """The same command, in the same folder or in another; the exit status."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ROBUSTCM_CACHE", str(self.images.parent / "cache"))
            return main([*self.words, f"--out={out or self.out}", "--seeds", *map(str, seeds), *more])


@pytest.fixture(scope="module")
def ladder(kept_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    root, printed = tmp_path_factory.mktemp("ladder"), StringIO()
    images = shutil.copytree(kept_images, root / "images")
    words = ["ablate", "--device=cpu", *(option.format(folder=repr(str(images))) for option in TINY)]
    words += ["--arms", "ours", "--suites", "outliers-5%", "--steps", "3"]
    ladder = Ladder(images, root / "out", "", words)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        train_here(patch)
        assert ladder.again() == 0
    return ladder._replace(printed=printed.getvalue())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.usefixtures("in_process")
def test_a_signal_is_passed_on_to_the_runs_and_starts_no_further_one(
    number: int, status: int, command: list[str], monkeypatch: pytest.MonkeyPatch
):
    class Signalled:
        """A training that is under way when its parent is stopped; it saves, and ends as it was told."""

        got: ClassVar[list[int]] = []
        returncode = None

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def send_signal(self, number: int) -> None:
            self.got.append(number)
            self.returncode = status

        def wait(self) -> int | None:
            signal.raise_signal(number)
            return self.returncode

    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(Popen=Signalled))
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert main([*command, "--arms", "ours", "--suites", "clean", "--seeds", "0", "1", "--steps", "3"]) == status
    assert Signalled.got == [number]
    assert before == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]


def test_a_ladder_runs_to_its_table(ladder: Ladder):
    assert "| ours |" in ladder.printed
    runs = json.loads((ladder.out / "ablation.json").read_text())["runs"]
    assert [(run["arm"], run["seed"], run["failure"]) for run in runs] == [
        *((BASELINE, 0, ""), ("ours", 0, ""), (BASELINE, 1, ""), ("ours", 1, ""))
    ]
    assert ["reconstructions" in run["rows"] for run in runs] == [True, False, False, False]  # measured once a suite
    assert "FD of the bounds: reconstructions" in ladder.printed
    assert all(run["rows"][ONE].keys() >= {"frechet_rec", "kernel_rec_x1000"} for run in runs)
    assert "Ranked by FD rec at 1 evaluation" in ladder.printed
    config = RunFolder(ladder.out / "outliers-5pc" / "ours" / "seed-1").config()
    assert (config.seed, config.steps, config.outliers.share) == (1, 3, 0.05)
    assert (ladder.out / "ablation.png").exists()


def test_a_second_call_runs_nothing(ladder: Ladder, monkeypatch: pytest.MonkeyPatch):
    before = {file: file.stat().st_mtime_ns for file in ladder.out.glob("*/*/*/evaluation.json")}
    assert len(before) == 4
    train_here(monkeypatch, lambda *_, **__: pytest.fail("runs again"))
    assert ladder.again() == 0
    assert before == {file: file.stat().st_mtime_ns for file in ladder.out.glob("*/*/*/evaluation.json")}


class Judged:
    """A training that is an evaluation and nothing else."""

    returncode = 0

    def __init__(self, command: list[str], **_: object) -> None:
        (root,) = (word.removeprefix("--out=") for word in command if word.startswith("--out="))
        (Path(root) / "evaluation.json").write_text(
            json.dumps({"rows": {ONE: {"frechet": 5.0}, TWO: {"frechet": 4.0}}})
        )

    def wait(self) -> int:
        return self.returncode


def test_an_arm_typed_by_hand_is_a_preset_and_what_differs(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train_here(monkeypatch, Judged)
    command += ["--arm", "paper", "objective.gate=Above(3)", "ema_decay=0.9", "--steps", "2", "--seeds", "0"]
    assert main(command) == 0
    runs = json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == [BASELINE, "paper gate=Above(3) ema_decay=0.9"]
    config = RunFolder(tmp_path / "out" / "clean" / "paper-gate-above-3-ema-decay-0-9" / "seed-0").config()
    assert (config.objective.gate, config.ema_decay, config.non_scaling_norm) == (Above(3.0), 0.9, True)


@pytest.mark.usefixtures("in_process")
def test_recipes_are_compared_on_the_store_of_a_data_set(image_folder: Path, command: list[str], tmp_path: Path):
    encoding = Encoding(source=ImageFolder(path=str(image_folder), resolution=16), autoencoder=PixelSpace())
    encode_folder(encoding, tmp_path / "store", torch.device("cpu"), tmp_path / "cache")
    command = [word for word in command if not word.startswith(("data=", "autoencoder="))]
    command += ["celebahq", f"--data={tmp_path / 'store'}", "--arm", "paper", "--steps", "2", "--seeds", "0"]
    assert main(command) == 0
    runs = json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"]
    assert [(run["arm"], run["failure"]) for run in runs] == [(BASELINE, ""), ("paper", "")]
    for name in ("ilct", "paper"):
        config = RunFolder(tmp_path / "out" / "clean" / name / "seed-0").config()
        assert (config.data.path, config.ema_decay) == (str(tmp_path / "store"), 0.9999)


def test_the_runs_are_processes_of_their_own_and_compared_in_features_of_the_users(
    ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One is, for which pictures are not drawn either; the others are there."""
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", here)
    out = shutil.copytree(ladder.out, tmp_path / "out")
    run = out / "outliers-5pc" / "ours" / "seed-1"
    shutil.rmtree(run)
    assert ladder.again("--features", "flat_features:flat_pixels", out=out) == 0
    assert json.loads((run / "evaluation.json").read_text())["features"] == "flat_features:flat_pixels"
    assert RunFolder(run).latest_checkpoint()[0] == 3


@pytest.mark.usefixtures("in_process")
def test_an_arm_that_fails_is_named_and_the_others_go_on(
    ladder: Ladder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = shutil.copytree(ladder.out, tmp_path / "out")
    run = out / "outliers-5pc" / "ours" / "seed-0"
    (run / "evaluation.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(b"")
    assert ladder.again(out=out) == 0
    assert "seed 0 failed: no checkpoint in" in capsys.readouterr().out
    failed = [r["failure"] != "" for r in json.loads((out / "ablation.json").read_text())["runs"]]
    assert failed == [False, True, False, False]


@pytest.mark.usefixtures("in_process")
def test_a_budget_in_seconds_gives_each_arm_its_steps_and_remembers_them(command: list[str], tmp_path: Path):
    command += ["--arms", "ours", "--seeds", "0", "--seconds", "0.2"]
    assert main(command) == 0
    timing = json.loads((tmp_path / "out" / "timing.json").read_text())
    timed = {key.partition(",")[0]: seconds for key, seconds in timing.items()}
    assert timed.keys() == {BASELINE, "ours"}
    runs = json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"]
    assert {run["arm"]: run["steps"] for run in runs} == {
        arm: max(1, round(0.2 / seconds)) for arm, seconds in timed.items()
    }


def test_the_time_of_an_arm_is_that_of_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = list[str]()

    def timed(arms: Sequence[tuple[str, TrainConfig]], *_: object) -> dict[str, float]:
        asked.extend(name for name, _ in arms)
        return {name: 0.01 * len(asked) for name, _ in arms}

    monkeypatch.setattr(budget, "seconds_per_step", timed)
    latents, file = torch.zeros(4, 2, 4, 4), tmp_path / "timing.json"
    configs = digits(), replace(digits(), batch_size=64), replace(digits(), seed=7)
    found = [budget.steps_within(0.2, [("ours", config)], latents, None, file, CPU)["ours"] for config in configs]
    assert found == [20, 10, 20]
    assert asked == ["ours", "ours"]


def test_a_step_in_micro_batches_is_timed_whole(monkeypatch: pytest.MonkeyPatch):
    asked = list[int]()

    class Noted(Batches):
        def __call__(self, step: int, part: int = 0) -> Batch:
            asked.append(part)
            return super().__call__(step, part)

    monkeypatch.setattr(budget, "Batches", Noted)
    config = replace(digits(), batch_size=8, micro_batches=4, coupling_pool=1)
    budget.seconds_per_step([("ours", config)], torch.randn(16, 2, 4, 4), None, CPU, turns=1)
    assert asked == [0, 1, 2, 3] * 5


@pytest.mark.parametrize("features", [None, "wavelets"])
def test_only_the_evaluation_of_the_last_step_by_these_features_ends_a_run(features: str | None, tmp_path: Path):
    config = replace(digits(), steps=20)
    job = ablate.Job("clean", "ours", 0, config, RunFolder(tmp_path), True, features)
    file = tmp_path / "evaluation.json"
    assert not job.finished()
    others = features is None
    for step, by, ends in ((10, "wavelets", False), (20, "wavelets", True), (20, "inception (FID)", others)):
        file.write_text(json.dumps({"step": step, "features": by}))
        assert job.finished() == ends
    for spoilt in ('{"step": 20', "[20]"):
        file.write_text(spoilt)
        assert not job.finished()
    file.write_text(json.dumps({"step": 20, "features": "inception (FID; kernel: KID)"}))
    assert replace(job, features="inception").finished()


def test_an_error_stops_the_runs_that_are_under_way():
    class Child:
        def __init__(self) -> None:
            self.got = list[int]()

        def send_signal(self, number: int) -> None:
            self.got.append(number)

    children, child = ablate.Children(), Child()
    children.__enter__()._running.add(child)
    children.__exit__(UserError, UserError("a full disk"), None)
    assert children.stopping
    assert child.got == [signal.SIGINT]


def test_a_pretrained_network_is_loaded_once_for_all_arms(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved(tmp_path / "it")
    loads, load, made = list[Place](), Place.load, list[TrainConfig]()

    def enough(arms: list[tuple[Arm, TrainConfig]], *_: object) -> NoReturn:
        made.extend(config for _, config in arms)
        raise UserError("enough")

    monkeypatch.setattr(Place, "load", lambda place: loads.append(place) or load(place))
    monkeypatch.setattr(ablate, "jobs_of", enough)
    command[-1] = f"network=FromDiffusers(name='{tmp_path / 'it'}')"
    assert main([*command, "--arms", "ours", "--arm", "paper", "--steps", "1"]) == 2
    assert len(made) == 3
    assert all(config.network.sha256 for config in made)
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "nonsense"], "unknown nonsense"),
        (["--suites", "dirty"], "unknown dirty"),
        (["--steps", "0"], "--steps must be positive"),
        (["--stop-above", "0.5"], "--stop-above must be larger than 1"),
        (["--features", "nowhere:features"], "expected an importable module:function"),
        (["nosuch=1"], "unknown option nosuch"),
        (["--arm", "nopreset", "ema_decay=0.9"], f"--arm begins with a preset ({THERE})"),
        (["--arm", "digits", "nosuch=1"], "unknown option nosuch"),
    ],
)
def test_a_mistake_gets_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main(["ablate", f"--out={tmp_path}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_arms_differ_from_one_another_and_share_what_is_no_technique():
    configs = {arm.name: arm.build(digits()) for arm in ARMS}
    assert len({repr(config) for config in configs.values()}) == len(ARMS)
    shared = ("data", "autoencoder", "network", "optimizer", "learning_rate", "batch_size", "steps", "ema_decay")
    for name, config in configs.items():
        assert all(getattr(config, field) == getattr(configs[BASELINE], field) for field in shared)
        same = config.objective.levels == configs[BASELINE].objective.levels
        assert same == (not name.endswith("denoiser first"))


def test_every_run_has_a_folder_of_its_own_and_seeds_come_in_rounds(tmp_path: Path):
    jobs = jobs_of([(arm, arm.build(digits())) for arm in ARMS], SUITES, [3, 4], tmp_path)
    assert len({job.run.root for job in jobs}) == len(jobs) == 2 * len(ARMS) * len(SUITES)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert all(job.config.seed == job.seed for job in jobs)


def test_training_seconds_add_up_over_sittings(tmp_path: Path):
    run = RunFolder(tmp_path)
    for step, seconds in enumerate([10.0, 20.0, 4.0, 9.0]):  # the second sitting restarts the clock
        run.append_row("metrics.jsonl", {"step": step, "seconds": seconds})
    assert training_seconds(run) == 29.0


def test_runs_made_from_other_images_are_not_compared_with_new_ones(
    ladder: Ladder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before, gone = (ladder.out / "ablation.json").read_bytes(), ladder.images / "00.png"
    gone.rename(tmp_path / "gone")
    try:
        assert ladder.again(seeds=(0, 1, 2)) == 2
    finally:
        (tmp_path / "gone").rename(gone)
    assert "36 training and 4 held-out images of 3 x 16 x 16 then, 36 training and 3" in capsys.readouterr().err
    assert (ladder.out / "ablation.json").read_bytes() == before
