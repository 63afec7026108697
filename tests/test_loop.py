"""Training continues bit-exactly after any end, and says what went wrong when something did."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

from reference_trainer.__main__ import main
from reference_trainer.config import ConstantLR, TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.images import ImageFolder
from reference_trainer.errors import UserError
from reference_trainer.evaluation.evaluate import Evaluator, brief, choose_features, evaluate
from reference_trainer.files import load_tensors, save_tensors
from reference_trainer.model import TrainedModel, load_model
from reference_trainer.networks import UNet
from reference_trainer.optimizers import Adam, Muon, RAdam
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches
from reference_trainer.training.loop import train
from robustcm.couplers import exact
from robustcm.early import EarlyDiffusion
from robustcm.flow_maps import FlowMapObjective
from robustcm.flow_targets import Derivative
from robustcm.gates import Above
from robustcm.objective import Batch, FewStepObjective, Objective
from robustcm.scales import MeasuredC
from robustcm.trajectories import TrajectoryObjective

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(kept_images: Path) -> TrainConfig:
    """12 steps that exercise all there is: dropout, coupling, a measured c, the early term, converted norms."""
    return TrainConfig(
        data=ImageFolder(path=str(kept_images), resolution=16),
        autoencoder=KLAutoencoder(
            latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, steps=2, batch_size=4
        ),
        network=UNet(block_out_channels=(8,), attention=(False,), norm_num_groups=4, dropout=0.1),
        non_scaling_norm=True,
        objective=Objective(c=MeasuredC(bins=2), coupler=exact, gate=Above(0.5), extra=EarlyDiffusion()),
        batch_size=8,
        steps=12,
        log_every=2,
        save_every=3,
    )


def typed(value: object) -> str:
    """``value`` as one would type it on the command line."""
    if is_dataclass(value):
        inside = ", ".join(f"{field.name}={typed(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({inside})"
    return getattr(value, "__name__", None) or repr(value)


def as_options(config: TrainConfig) -> list[str]:
    """Every field of ``config``, so that no preset's default can make the command's run another one."""
    whole = [field.name for field in fields(config) if field.name != "data"]
    options = [f"{name}={typed(getattr(config, name))}" for name in whole]
    return [f"--data={config.data.path}", f"data.resolution={config.data.resolution}", *options]


def run(config: TrainConfig, root: Path) -> RunFolder:
    """Train in ``root`` as the command line does, without the report."""
    folder = RunFolder(root)
    with folder.locked():
        folder.claim(config)
        images = config.data.load()
        train(config, folder, images, root.parent / "cache", CPU, Evaluator(folder, images))
    return folder


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """``config`` trained without an interruption, to be looked at only."""
    return run(config, tmp_path_factory.mktemp("uninterrupted") / "whole")


def final_tensors(folder: RunFolder) -> dict[str, torch.Tensor]:
    found = folder.latest_checkpoint()
    assert found is not None
    return found[1]


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


class CrashError(Exception):
    """Stands for a crash at a chosen step."""


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing(Batches):
        def __call__(self, asked: int, part: int = 0) -> Batch:
            if asked == step:
                raise CrashError
            return super().__call__(asked, part)

    monkeypatch.setattr(loop, "Batches", Crashing)


@pytest.mark.parametrize(("step", "optimizer"), [(1, Adam()), (3, Adam()), (7, RAdam()), (11, Adam()), (3, Muon())])
def test_a_run_that_crashed_continues_bit_exactly(
    step: int,
    optimizer: Adam,
    config: TrainConfig,
    whole: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if optimizer != config.optimizer:
        config = replace(config, optimizer=optimizer)
        whole = run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(step, patch)
        with pytest.raises(CrashError):
            run(config, tmp_path / "crashed")
    crashed = run(config, tmp_path / "crashed")
    assert_same(final_tensors(whole), final_tensors(crashed))
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in whole.metrics()]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in crashed.metrics()]


@pytest.mark.parametrize(
    "objective",
    [
        FlowMapObjective(c=MeasuredC(bins=2), coupler=exact, gate=Above(0.5)),
        FlowMapObjective(target=Derivative()),
        TrajectoryObjective(c=MeasuredC(bins=2), coupler=exact, gate=Above(0.5)),
    ],
    ids=["two-point", "derivative", "trajectory"],
)
def test_every_method_continues_bit_exactly_and_samples(
    objective: FewStepObjective, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(config, objective=objective, steps=4, save_every=1)
    whole = run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(2, patch)
        with pytest.raises(CrashError):
            run(config, tmp_path / "crashed")
    assert_same(final_tensors(whole), final_tensors(run(config, tmp_path / "crashed")))
    model = load_model(whole, CPU)
    assert model.config == config
    for evaluations in (1, 2, 3):
        levels = model.sigmas(evaluations)
        assert len(levels) == evaluations
        latents = model.latents(3, levels, seed=0)
        assert latents.isfinite().all()
        assert torch.equal(latents, model.latents(3, levels, seed=0))


def killed_behind_step_7(words: list[str]) -> None:
    """What a process does: train, and be killed in the middle."""

    class Killing(Batches):
        def __call__(self, step: int, part: int = 0) -> Batch:
            if step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(step, part)

    loop.Batches = Killing
    main(words)


@pytest.mark.usefixtures("drawn_pictures")
def test_kill_9_and_the_same_command_again_give_the_weights_of_an_uninterrupted_run(
    config: TrainConfig,
    whole: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    words, killed = [*as_options(config), f"--run={tmp_path / 'killed'}"], RunFolder(tmp_path / "killed")
    process = multiprocessing.get_context("fork").Process(target=killed_behind_step_7, args=(words,))
    process.start()  # a fork: torch is imported already
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert killed.latest_checkpoint()[0] == 6
    assert main(words) == 0
    assert_same(final_tensors(whole), final_tensors(killed))
    for name in ("config.json", "metrics.jsonl", "evaluations.jsonl", "evaluation.json", "samples.png", "losses.png"):
        assert (killed.root / name).stat().st_size > 0
    assert list((killed.root / "tensorboard").iterdir())
    assert "held-out" in capsys.readouterr().out


def test_ctrl_c_saves_and_the_rest_is_as_if_nothing_had_happened(
    config: TrainConfig, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Pressing(Batches):
        def __call__(self, step: int, part: int = 0) -> Batch:
            if step == 4:
                signal.raise_signal(signal.SIGINT)
            return super().__call__(step, part)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Batches", Pressing)
        stopped = run(config, tmp_path / "stopped")
    assert stopped.latest_checkpoint()[0] == 5
    assert_same(final_tensors(whole), final_tensors(run(config, tmp_path / "stopped")))


def test_a_second_ctrl_c_interrupts_at_once_and_a_second_sigterm_does_not():
    for first in (signal.SIGINT, signal.SIGTERM):
        request = loop.StopRequest()
        request(first, None)
        request(signal.SIGTERM, None)
        assert (bool(request), request.terminated) == (True, True)
        with pytest.raises(KeyboardInterrupt):
            request(signal.SIGINT, None)


@pytest.mark.parametrize("every", [1, 5])
def test_evaluating_while_training_changes_no_weight(every: int, config: TrainConfig, whole: RunFolder, tmp_path: Path):
    evaluated = run(replace(config, evaluate_every=every), tmp_path / "run")
    assert [row["step"] for row in evaluated.evaluations()] == list(range(every, 12, every))
    assert whole.evaluations() == []
    assert_same(final_tensors(whole), final_tensors(evaluated))


def test_an_evaluation_in_training_is_that_of_the_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    crash_at(10, monkeypatch)
    with pytest.raises(CrashError):
        run(replace(config, evaluate_every=3), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    model = load_model(folder, CPU)
    row = brief(evaluate(model, config.data.load(), choose_features(None, model)))
    assert row["step"] == 9
    assert folder.evaluations()[-1] == row
    assert row["rows"].keys() == {"1 evaluation", "2 evaluations"}
    assert row["rows"]["1 evaluation"].keys() >= {"frechet", "kernel_x1000", "precision", "recall"}


def test_a_run_of_an_earlier_version_says_what_to_do(config: TrainConfig, tmp_path: Path):
    folder = run(config, tmp_path / "run")
    tensors, about = load_tensors(folder.root / "autoencoder.safetensors")
    del about["recognised_at"]
    save_tensors(folder.root / "autoencoder.safetensors", tensors, about)
    with pytest.raises(UserError, match="the train command, given again"):
        load_model(folder, CPU)
    run(config, folder.root)
    load_model(folder, CPU)


def test_evaluations_behind_the_restored_checkpoint_are_dropped_and_made_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(config, evaluate_every=4)
    whole, crashed = run(config, tmp_path / "whole"), RunFolder(tmp_path / "crashed")
    for step, steps in ((5, [4]), (3, [])):  # the second crash comes right behind the checkpoint of step 3
        with monkeypatch.context() as patch:
            crash_at(step, patch)
            with pytest.raises(CrashError):
                run(config, crashed.root)
        assert [row["step"] for row in crashed.evaluations()] == steps
        if step == 5:  # that of step 4, which was saved to be evaluated, is damaged
            crashed.checkpoints()[0].write_bytes(b"")
    run(config, crashed.root)
    assert crashed.evaluations() == whole.evaluations()
    assert [row["step"] for row in whole.evaluations()] == [4, 8]


def test_what_is_evaluated_is_saved_before(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = list[tuple[int, str]]()

    def judged(self: Evaluator, model: TrainedModel) -> None:
        seen.append((model.step, self.run.checkpoints()[0].stem))

    monkeypatch.setattr(Evaluator, "__call__", judged)
    run(replace(config, evaluate_every=5, save_every=10**6), tmp_path / "run")
    assert seen == [(5, "step_00000005"), (10, "step_00000010")]


def test_a_finished_run_ends_with_its_final_evaluation_once(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        assert main([*as_options(config), "evaluate_every=6", f"--run={folder.root}", "--brief"]) == 0
        final = json.loads((folder.root / "evaluation.json").read_text())
        assert [row["step"] for row in folder.evaluations()] == [6, 12]
        assert folder.evaluations()[-1] == brief(final)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run(config, tmp_path / "run")
    intact = final_tensors(folder)
    newest, before = folder.checkpoints()
    damaged = bytearray(newest.read_bytes())
    damaged[-100] ^= 1
    newest.write_bytes(damaged)
    assert folder.latest_checkpoint()[0] == load_tensors(before)[1]["step"] == 9
    assert newest.name in capsys.readouterr().out
    assert_same(intact, final_tensors(run(config, tmp_path / "run")))


def test_no_readable_checkpoint_is_an_error_not_a_restart(config: TrainConfig, tmp_path: Path):
    folder = run(config, tmp_path / "run")
    for file in folder.checkpoints():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="delete that folder"):
        run(config, tmp_path / "run")


def test_a_folder_of_another_configuration_is_refused_and_the_difference_named(config: TrainConfig, tmp_path: Path):
    run(config, tmp_path / "run")
    with pytest.raises(UserError, match="batch_size: 8 -> 4"):
        run(replace(config, batch_size=4), tmp_path / "run")


def test_two_processes_cannot_train_in_one_folder(config: TrainConfig, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(UserError, match="another process"), folder.locked():
        pass


def test_a_batch_larger_than_the_data_is_said(config: TrainConfig, tmp_path: Path):
    with pytest.raises(UserError, match="batch_size=37 is larger than the 36 training images"):
        run(replace(config, batch_size=37), tmp_path / "run")


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_step_and_saves_nothing_after(
    config: TrainConfig, tmp_path: Path
):
    config = replace(config, learning_rate=ConstantLR(lr=1e30), optimizer=RAdam(max_norm=float("inf")))
    config = replace(config, save_every=1, evaluate_every=1)
    config = replace(config, optimizer=replace(config.optimizer, on_nonfinite="stop"))
    with pytest.raises(UserError, match=r"a bad step, at step (\d+)") as caught:
        run(config, tmp_path / "run")
    bad = int(str(caught.value).split("at step ")[1].split(":")[0])
    step, tensors = RunFolder(tmp_path / "run").latest_checkpoint()
    assert step < bad
    assert all(row["step"] < bad for row in RunFolder(tmp_path / "run").evaluations())
    assert int(tensors["num_bad_steps"]) == 0


def test_sampling_and_evaluating_a_run(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = run(config, tmp_path / "run").root
    assert main(["sample", str(root), "--n=5", "--evaluations=3", f"--out={tmp_path / 'x.png'}"]) == 0
    first = (tmp_path / "x.png").read_bytes()
    assert main(["sample", str(root), "--n=5", "--evaluations=3", f"--out={tmp_path / 'x.png'}"]) == 0
    assert (tmp_path / "x.png").read_bytes() == first
    assert main(["evaluate", str(root)]) == 0
    assert "pooled" in capsys.readouterr().out


def test_every_preset_takes_a_step(image_folder: Path, tmp_path: Path):
    from reference_trainer.presets import PRESETS

    for number, file in enumerate(sorted(image_folder.glob("*.png"))):  # two classes
        (image_folder / f"class{number % 2}").mkdir(exist_ok=True)
        file.rename(image_folder / f"class{number % 2}" / file.name)
    for preset in PRESETS:
        config = replace(preset(), data=ImageFolder(path=str(image_folder), resolution=32), steps=1, batch_size=4)
        if isinstance(config.autoencoder, KLAutoencoder):
            config = replace(config, autoencoder=replace(config.autoencoder, steps=1))
        run(config, tmp_path / preset.__name__)


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "cache").write_text("not a folder")
    folder = run(config, tmp_path / "run")
    assert folder.latest_checkpoint()[0] == config.steps
    assert "not cached" in capsys.readouterr().out


def test_a_run_folder_alone_is_continued_as_it_is_configured(
    config: TrainConfig, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    begun = RunFolder(tmp_path / "begun")
    begun.root.mkdir()
    begun.claim(config)
    assert main([f"--run={begun.root}", "--device=cpu"]) == 0
    assert_same(final_tensors(whole), final_tensors(begun))
