"""The ladder runs, goes on where it stopped, stops arms by its rule, says what failed; its statistics are scipy's."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TextIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reference_trainer.__main__ import main
from reference_trainer.ablation import ablate
from reference_trainer.ablation.ablate import jobs_of, stopped_arms, training_seconds
from reference_trainer.ablation.comparison import (
    ONE,
    TWO,
    Result,
    as_markdown,
    draw_comparison,
    judged_by,
    paired_ratio,
    ranking,
)
from reference_trainer.ablation.ladder import ARMS, BASELINE, SUITES
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.images import ImageFolder
from reference_trainer.presets import digits
from reference_trainer.run import RunFolder
from reference_trainer.words import NAMES
from robustcm.gates import Above

THERE = ", ".join(NAMES)
TINY = [
    *("data=ImageFolder(path={folder}, resolution=16)", "autoencoder=PixelSpace", "batch_size=8", "coupling_pool=2"),
    "network=UNet(block_out_channels=(8,), attention=(False,), norm_num_groups=4)",
]


def result(arm: str, seed: int, one: float, two: float = 5.0, suite: str = "clean") -> Result:
    rows = {ONE: {"frechet": one, "precision": 0.5}, TWO: {"frechet": two}, "reconstructions": {"frechet": 1.0}}
    return Result(suite=suite, arm=arm, seed=seed, steps=10, seconds=1.0, rows=rows)


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


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(Popen=InThisProcess))  # and nobody else's
    monkeypatch.setattr(ablate, "ThreadPoolExecutor", AtOnce)


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


@pytest.mark.usefixtures("in_process")
def test_a_ladder_runs_to_its_table_and_a_second_call_runs_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command += ["--arms", "ours", "--suites", "outliers-5%", "--seeds", "0", "1", "--steps", "3"]
    assert main(command) == 0
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "| ours |" in printed
    runs = json.loads((out / "ablation.json").read_text())["runs"]
    assert [(run["arm"], run["seed"], run["failure"]) for run in runs] == [
        *((BASELINE, 0, ""), ("ours", 0, ""), (BASELINE, 1, ""), ("ours", 1, ""))
    ]
    assert ["reconstructions" in run["rows"] for run in runs] == [True, False, False, False]  # measured once a suite
    assert "FD of the bounds: reconstructions" in printed
    assert all(run["rows"][ONE].keys() >= {"frechet_rec", "kernel_rec_x1000"} for run in runs)
    assert "Ranked by FD rec at 1 evaluation" in printed
    config = RunFolder(out / "outliers-5pc" / "ours" / "seed-1").config()
    assert (config.seed, config.steps, config.outliers.share) == (1, 3, 0.05)
    assert (out / "ablation.png").stat().st_size > 10_000
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*/*/evaluation.json")}
    assert len(before) == 4
    assert main(command) == 0
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*/*/*/evaluation.json")}


@pytest.mark.usefixtures("in_process")
def test_an_arm_typed_by_hand_is_a_preset_and_what_differs(command: list[str], tmp_path: Path):
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


def flat_pixels():
    """What ``--features`` calls."""
    return lambda pixels: pixels.float().flatten(1)[:, ::97]


def test_the_runs_are_processes_of_their_own_and_compared_in_features_of_the_users(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", here)
    command += ["--arms", BASELINE, "--seeds", "0", "--steps", "2", "--features", "test_ablate:flat_pixels"]
    assert main(command) == 0
    (evaluation,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/*/*/evaluation.json"))
    assert evaluation["features"] == "test_ablate:flat_pixels"


@pytest.mark.usefixtures("in_process")
def test_an_arm_that_fails_is_named_and_the_others_go_on(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command += ["--arms", "ours", "--seeds", "0", "--steps", "4"]
    assert main(command) == 0
    run = tmp_path / "out" / "clean" / "ours" / "seed-0"
    (run / "evaluation.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(b"")
    capsys.readouterr()
    assert main(command) == 0
    assert "seed 0 failed: no checkpoint in" in capsys.readouterr().out
    failed = [r["failure"] != "" for r in json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"]]
    assert failed == [False, True]


@pytest.mark.usefixtures("in_process")
def test_a_budget_in_seconds_gives_each_arm_its_steps_and_remembers_them(command: list[str], tmp_path: Path):
    command += ["--arms", "ours", "--seeds", "0", "--seconds", "0.2"]
    assert main(command) == 0
    timing = json.loads((tmp_path / "out" / "timing.json").read_text())
    assert timing.keys() == {BASELINE, "ours"}
    runs = json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"]
    assert {run["arm"]: run["steps"] for run in runs} == {
        arm: max(1, round(0.2 / seconds)) for arm, seconds in timing.items()
    }


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
    for config in configs.values():
        assert all(getattr(config, name) == getattr(configs[BASELINE], name) for name in shared)
        assert config.objective.levels == configs[BASELINE].objective.levels


def test_every_run_has_a_folder_of_its_own_and_seeds_come_in_rounds(tmp_path: Path):
    jobs = jobs_of([(arm, arm.build(digits())) for arm in ARMS], SUITES, [3, 4], tmp_path)
    assert len({job.run.root for job in jobs}) == len(jobs) == 2 * len(ARMS) * len(SUITES)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert all(job.config.seed == job.seed for job in jobs)


def test_the_rule_stops_an_arm_on_its_first_seed_alone_and_suite_by_suite():
    results = [result(BASELINE, 0, 10), result("bad", 0, 31), result("good", 0, 29), result("bad", 1, 5)]
    results += [result(BASELINE, 0, 100, suite="other"), result("bad", 0, 31, suite="other")]
    assert stopped_arms(results, 3.0) == [("clean", "bad")]
    assert stopped_arms(results, math.inf) == []
    assert stopped_arms(results[1:], 3.0) == []  # no baseline, no verdict


def with_rec(run: Result, one: float, two: float = 4.0) -> Result:
    """``run``, measured against the reconstructions, too."""
    more = {ONE: one, TWO: two}
    rows = {name: row | ({"frechet_rec": more[name]} if name in more else {}) for name, row in run.rows.items()}
    rows["bound: Gaussian latents decoded"] = {"frechet": 100.0, "frechet_rec": 90.0}
    return replace(run, rows=rows)


def test_arms_are_ranked_and_stopped_by_the_reconstructions_where_every_run_has_them():
    """Against the images the order is turned round by what the autoencoder loses, as it was on faces."""
    runs = [with_rec(result(BASELINE, 0, 800), 20), with_rec(result("near", 0, 830), 10)]
    runs.append(with_rec(result("far", 0, 820), 70))
    assert judged_by(runs, "clean") == "frechet_rec"
    assert ranking(runs, "clean", BASELINE) == [("near", 0.5), (BASELINE, 1.0), ("far", 3.5)]
    assert stopped_arms(runs, 3.0) == [("clean", "far")]
    older = [*runs, result("older", 0, 2500)]
    assert judged_by(older, "clean") == "frechet"
    assert [arm for arm, _ in ranking(older, "clean", BASELINE)] == [BASELINE, "far", "near", "older"]
    assert stopped_arms(older, 3.0) == [("clean", "older")]
    failed = replace(result("failed", 0, 1), rows={}, failure="NaN")
    assert ranking([*runs, failed], "clean", BASELINE) == ranking(runs, "clean", BASELINE)
    assert judged_by([failed], "clean") == judged_by([], "clean") == "frechet"


def test_the_table_shows_both_distances_and_says_which_one_ranks():
    runs = [with_rec(result(BASELINE, 0, 800), 20), with_rec(result("near", 0, 840), 10)]
    table = as_markdown(runs, BASELINE)
    assert "| near | 840.0 | 1.05 | 5.0 | 1.00 | 10.0 | 0.50 | 4.0 | 1.00 |" in table
    assert f"Ranked by FD rec at 1 evaluation, as ratios to the baseline: near 0.50; {BASELINE} 1.00." in table
    assert "FD of the bounds: reconstructions 1.0; bound: Gaussian latents decoded 100.0." in table
    assert "FD rec of the bounds: bound: Gaussian latents decoded 90.0." in table
    assert all(line.count("|") == table.splitlines()[2].count("|") for line in table.splitlines() if line[:1] == "|")


def test_runs_of_an_earlier_version_have_dashes_and_are_ranked_by_what_they_have():
    table = as_markdown([result(BASELINE, 0, 10), result("other", 0, 5)], BASELINE)
    assert "| other | 5.0 | 0.50 | 5.0 | 1.00 | - | - | - | - |" in table
    assert "Ranked by FD (not every run has FD rec) at 1 evaluation" in table
    assert "FD rec of" not in table


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=6))
def test_the_ratio_is_the_exponential_of_scipys_paired_t_interval(pairs: list[tuple[float, float]]):
    logs = np.log([a / b for a, b in pairs])
    found = paired_ratio(dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs)))
    assert found.mean == pytest.approx(stats.gmean([a / b for a, b in pairs]))
    if logs.std() > 1e-9:
        low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))


def test_only_common_seeds_are_paired():
    assert paired_ratio({0: 2.0, 5: 9.0}, {0: 1.0, 7: 1.0}) == paired_ratio({0: 2.0}, {0: 1.0})
    assert str(paired_ratio({0: 2.0}, {0: 1.0})) == "2.00"
    assert paired_ratio({1: 2.0}, {0: 1.0}) is None


def test_the_table_says_what_failed_what_stopped_and_what_bounds_the_figures():
    broken = replace(result("broken", 0, 1), rows={}, failure="the gradient became NaN")
    table = as_markdown([result(BASELINE, 0, 10), result("bad", 0, 40), broken], BASELINE, [("clean", "bad")])
    assert "| broken (seed 0 failed: the gradient became NaN) | - |" in table
    assert "| bad (further seeds skipped by the rule) | 40.0 | 4.00 |" in table
    assert "reconstructions 1.0" in table


def test_the_picture_has_a_panel_a_suite_and_a_line_an_arm():
    results = [result(arm, seed, 10 + seed, suite=s) for s in ("a", "b") for arm in ("x", "y") for seed in (0, 1)]
    figure = draw_comparison(results, "x")
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["x", "y"]


def test_the_picture_shows_the_distance_that_arms_are_ranked_by():
    plain = [result(arm, 0, 10) for arm in ("x", "y")]
    ranked = [replace(r, rows={ONE: {"frechet": 10.0, "frechet_rec": 3.0}}) for r in plain]
    for results, to, at in ((plain, "images", 10), (ranked, "reconstructions", 3)):
        (ax,) = draw_comparison(results, "x").axes
        assert ax.get_xlabel() == f"Frechet distance to the {to} (lower is better)"
        assert ax.lines[0].get_xdata() == pytest.approx([at])


def test_training_seconds_add_up_over_sittings(tmp_path: Path):
    run = RunFolder(tmp_path)
    for step, seconds in enumerate([10.0, 20.0, 4.0, 9.0]):  # the second sitting restarts the clock
        run.append_row("metrics.jsonl", {"step": step, "seconds": seconds})
    assert training_seconds(run) == 29.0


@pytest.mark.usefixtures("in_process")
def test_runs_made_from_other_images_are_not_compared_with_new_ones(
    command: list[str], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command += ["--arms", BASELINE, "--seeds", "0", "--steps", "2"]
    assert main(command) == 0
    before = (tmp_path / "out" / "ablation.json").read_bytes()
    (image_folder / "00.png").unlink()
    capsys.readouterr()
    assert main([*command[:-4], "--seeds", "0", "1", "--steps", "2"]) == 2
    assert "36 training and 4 held-out images of 3 x 16 x 16 then, 36 training and 3" in capsys.readouterr().err
    assert (tmp_path / "out" / "ablation.json").read_bytes() == before
