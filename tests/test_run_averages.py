"""The averages of a run: they change nothing else, survive a crash, and are sampled from, kept or reconstructed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference_trainer.__main__ import main
from reference_trainer.averages import averages_of, check_snapshots, prefix
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder
from reference_trainer.errors import UserError
from reference_trainer.evaluation.averages import LADDER, candidates, draw_averages, relative_length
from reference_trainer.files import load_tensors
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.options import from_json, override, to_json
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches
from reference_trainer.training.loop import train
from robustcm.averages import UNIFORM, Average, Exponential, PowerFunction
from robustcm.gates import Above
from robustcm.objective import Batch, Objective

CPU = torch.device("cpu")
KEPT = (Exponential(decay=0.5), PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.2))


@pytest.fixture
def config(image_folder: Path) -> TrainConfig:
    """12 steps on pixels, a snapshot every 2, a checkpoint every 4."""
    return TrainConfig(
        data=ImageFolder(path=str(image_folder), resolution=16),
        autoencoder=PixelSpace(),
        clip=None,
        network=DiT(width=8, layers=1, heads=2, patch=8),
        objective=Objective(gate=Above(0.5)),
        averages=KEPT,
        snapshot_every=2,
        batch_size=8,
        steps=12,
        save_every=4,
    )


def run(config: TrainConfig, root: Path) -> RunFolder:
    folder = RunFolder(root)
    with folder.locked():
        folder.claim(config)
        train(config, folder, config.data.load(), root.parent / "cache", CPU)
    return folder


def crashed(config: TrainConfig, root: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that ended without warning before ``step``."""

    class Crashing(Batches):
        def __call__(self, asked: int, part: int = 0) -> Batch:
            if asked == step:
                raise MemoryError
            return super().__call__(asked, part)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Batches", Crashing)
        with pytest.raises(MemoryError):
            run(config, root)
    return RunFolder(root)


def final(folder: RunFolder) -> dict[str, Tensor]:
    found = folder.latest_checkpoint()
    assert found is not None
    return found[1]


def below(start: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def test_further_averages_change_nothing_else(config: TrainConfig, tmp_path: Path):
    without, with_them = run(replace(config, averages=()), tmp_path / "a"), run(config, tmp_path / "b")
    others = {name: tensor for name, tensor in final(with_them).items() if not name.startswith("averages/")}
    assert same(others, final(without))
    assert without.snapshots() == {}
    assert not (without.root / "snapshots").exists()


def test_each_average_is_what_its_rule_says(config: TrainConfig, tmp_path: Path):
    """The sampling average again, the weights again, and the mean of those behind every step."""
    kept = (Exponential(decay=config.ema_decay), Exponential(decay=0.0), PowerFunction(sigma_rel=UNIFORM))
    folder = run(replace(config, averages=kept, save_every=1, keep_checkpoints=12), tmp_path / "run")
    exponential, newest, mean = (below(prefix(average), final(folder)) for average in kept)
    assert same(exponential, below("ema/", final(folder)))
    assert same(newest, below("network/", final(folder)))
    weights = [vector(below("network/", load_tensors(file)[0])) for file in folder.checkpoints()]
    assert len(weights) == 12
    torch.testing.assert_close(vector(mean), torch.stack(weights).mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step", [1, 7, 11])
def test_a_run_that_crashed_ends_with_the_same_averages_and_snapshots(
    step: int, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, other = run(config, tmp_path / "whole"), crashed(config, tmp_path / "other", step, monkeypatch)
    for at, file in other.snapshots().items():
        if at > step // 4 * 4:  # behind the checkpoint: to be written again
            file.write_bytes(b"")
    run(config, other.root)
    assert same(final(whole), final(other))
    assert list(whole.snapshots()) == [2, 4, 6, 8, 10]
    for one, two in zip(whole.snapshots().values(), other.snapshots().values(), strict=True):
        assert same(load_tensors(one)[0], load_tensors(two)[0])


def test_a_snapshot_holds_the_power_functions_of_its_step_in_float32(config: TrainConfig, tmp_path: Path):
    folder = run(replace(config, save_every=2, keep_checkpoints=9), tmp_path / "run")
    checkpoints = {load_tensors(file)[1]["step"]: load_tensors(file)[0] for file in folder.checkpoints()}
    for step, file in folder.snapshots().items():
        tensors, about = load_tensors(file)
        there = {n: t for n, t in checkpoints[step].items() if n.startswith("averages/PowerFunction")}
        assert about["step"] == step
        assert same(tensors, there)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_kept_average_is_loaded_as_it_is(config: TrainConfig, tmp_path: Path):
    folder = run(config, tmp_path / "run")
    starts = {average: prefix(average) for average in KEPT}
    starts |= {None: "ema/", Exponential(decay=config.ema_decay): "ema/", Exponential(decay=0.0): "network/"}
    for average, start in starts.items():
        model = load_model(folder, CPU, average=average)
        assert same(dict(model.network.state_dict()), below(start, final(folder)))
        assert bool(model.average) == (average is not None)


def test_a_power_function_that_was_not_kept_is_near_what_it_would_have_been(config: TrainConfig, tmp_path: Path):
    wanted = PowerFunction(sigma_rel=0.15)
    folder = run(replace(config, snapshot_every=1), tmp_path / "run")
    there = run(replace(config, averages=(*KEPT, wanted)), tmp_path / "there")
    model = load_model(folder, CPU, average=wanted)
    found, kept = vector(dict(model.network.state_dict())), vector(below(prefix(wanted), final(there)))
    moved = (vector(below("network/", final(there))) - kept).norm()
    assert float((found - kept).norm() / moved) < 0.01
    assert "of 24 stored averages, its profile to 0." in model.average


def test_an_unfinished_run_is_reconstructed_of_what_it_kept_up_to_its_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = crashed(config, tmp_path / "run", 11, monkeypatch)
    assert max(folder.snapshots()) == 10
    wanted = PowerFunction(sigma_rel=0.1)
    model = load_model(folder, CPU, average=wanted)
    assert model.step == 8
    folder.snapshots()[10].unlink()
    assert same(model.network.state_dict(), load_model(folder, CPU, average=wanted).network.state_dict())
    folder.snapshots()[6].unlink()
    assert not same(model.network.state_dict(), load_model(folder, CPU, average=wanted).network.state_dict())


def test_snapshots_behind_the_restored_checkpoint_are_dropped(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = crashed(config, tmp_path / "run", 11, monkeypatch)
    assert list(folder.snapshots()) == [2, 4, 6, 8, 10]
    crashed(config, folder.root, 8, monkeypatch)  # at once
    assert list(folder.snapshots()) == [2, 4, 6, 8]


def test_snapshots_without_number_are_refused_before_training(config: TrainConfig, tmp_path: Path):
    many = replace(config, steps=4001, snapshot_every=4)
    check_snapshots(replace(many, snapshot_every=5))
    check_snapshots(replace(many, averages=()))
    check_snapshots(replace(many, steps=4000))
    with pytest.raises(UserError, match=r"1250 snapshots, .* give snapshot_every=5 or more"):
        run(replace(many, steps=5000), tmp_path / "run")


def test_a_run_from_before_there_were_averages_goes_on(config: TrainConfig, tmp_path: Path):
    config = replace(config, averages=(), snapshot_every=250)
    folder = run(config, tmp_path / "run")
    file = folder.root / "config.json"
    asked = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in asked.items() if k not in ("averages", "snapshot_every")}))
    assert folder.config() == config
    folder.checkpoints()[0].unlink()
    run(config, folder.root)
    assert load_model(folder, CPU).step == 12


@pytest.mark.parametrize(
    ("averages", "asked", "message"),
    [
        (KEPT, "Exponential(decay=0.3)", "has no Exponential(decay=0.3); it has Exponential(decay=0.0), Exponential"),
        ((), "PowerFunction(sigma_rel=0.1)", "must be in averages=... when it is trained"),
        (KEPT, "PowerFunction(sigma_rel=0.5)", "sigma_rel must be"),
        (KEPT, "PowerFunktion", "did you mean PowerFunction"),
        (KEPT, "(Exponential(decay=0.5), PowerFunction)", "takes one average"),
        (KEPT, "()", "takes one average"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_an_average_that_is_not_there_gets_one_line_before_anything_costly(
    command: str,
    averages: tuple[Average, ...],
    asked: str,
    message: str,
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.claim(replace(config, averages=averages))  # not even trained
    assert main([command, str(folder.root), "--average", asked, "--device=cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("spoil", ["cut short", "another network's"])
def test_a_snapshot_that_is_no_use_is_named(spoil: str, config: TrainConfig, tmp_path: Path):
    folder = run(config, tmp_path / "run")
    file = folder.snapshots()[6]
    if spoil == "cut short":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        folder.save_snapshot(6, {"averages/other": torch.zeros(1)})
    with pytest.raises(UserError, match=f"{file.name} is no use .* move it away"):
        load_model(folder, CPU, average=PowerFunction(sigma_rel=0.1))
    file.unlink()
    load_model(folder, CPU, average=PowerFunction(sigma_rel=0.1))


@pytest.mark.usefixtures("drawn_pictures")
def test_sampling_and_evaluating_by_average(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("reference_trainer.evaluation.averages.LADDER", (0.05, 0.1))
    root = run(config, tmp_path / "run").root
    for average in ("PowerFunction(0.1)", "Exponential(decay=0.5)"):
        assert main(["sample", str(root), "--n=4", "--average", average, "--device=cpu"]) == 0
    pictures = {file.name: file.read_bytes() for file in root.glob("samples-4-1-0-*.png")}
    assert set(pictures) == {
        "samples-4-1-0-PowerFunction-sigma_rel-0.1.png",
        "samples-4-1-0-Exponential-decay-0.5.png",
    }
    assert len(set(pictures.values())) == 2
    assert main(["evaluate", str(root), "--average", "PowerFunction(0.1)", "--device=cpu"]) == 0
    assert "averaged weights: PowerFunction(sigma_rel=0.1), of 12 stored averages" in capsys.readouterr().out
    one = json.loads((root / "evaluation-PowerFunction-sigma_rel-0.1.json").read_text())
    assert not (root / "evaluation.json").exists()

    assert main(["evaluate", str(root), "--averages", "--device=cpu"]) == 0
    lines, found = capsys.readouterr().out.splitlines(), json.loads((root / "averages.json").read_text())
    rows = found["rows"]
    assert found["manifest"].pop("samples") == one["manifest"].pop("samples") | {"average": "each row's own"}
    assert (found["step"], found["manifest"]) == (one["step"], one["manifest"])  # so figures of the two compare
    names = [row["average"] for row in rows]
    assert [f"Exponential(decay={decay})" for decay in (0.0, 0.5, 0.99)] == names[:3]
    assert [f"PowerFunction(sigma_rel={sigma_rel})" for sigma_rel in (0.05, 0.1, 0.2)] == names[3:]
    assert len(lines) == 2 + len(rows) + 1
    by_name = dict(zip(names, rows, strict=True))
    row = by_name["PowerFunction(sigma_rel=0.1)"]
    assert row["1 evaluation"] == pytest.approx(one["rows"]["1 evaluation"]["frechet"])
    assert row["2 evaluations, rec"] == pytest.approx(one["rows"]["2 evaluations"]["frechet_rec"])
    assert (root / "averages.png").stat().st_size > 0

    RunFolder(root).snapshots()[4].write_bytes(b"")
    assert main(["evaluate", str(root), "--averages", "--device=cpu"]) == 0
    assert capsys.readouterr().out.count("left out:") == 1


def test_the_ladder_is_looked_at_only_where_there_are_power_functions(config: TrainConfig):
    assert candidates(replace(config, averages=())) == list(averages_of(replace(config, averages=())))
    found = candidates(config)
    assert len(set(found)) == len(found) == 3 + len({*LADDER, 0.05, 0.2})
    lengths = [relative_length(average, 4000) for average in found]
    assert lengths[:3] == sorted(lengths[:3])
    assert lengths[3:] == sorted(lengths[3:])


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_the_length_of_an_exponential_is_the_standard_deviation_of_what_it_counts(decay: float):
    ages = torch.arange(5000, dtype=torch.float64)
    counts = (1 - decay) * decay**ages
    spread = math.sqrt(float(counts @ ages**2 - (counts @ ages) ** 2))
    assert relative_length(Exponential(decay=decay), 100) == pytest.approx(spread / 100)


def test_what_was_left_out_is_not_drawn():
    row = {"average": "Exponential(decay=0.5)", "sigma_rel": 0.1, "1 evaluation": 3.0, "2 evaluations": None}
    manifest = {
        "reference": {"fingerprint": "0123", "n": 36},
        "features": {"name": "mine:$f_", "digest": "4567", "resize": "none", "kernel": "unscaled"},
        "samples": {"n": 36, "seed": 8, "average": "each row's own", "guidance": 1.5},
        "code": "0.1.0",
        "device": "cpu",
    }
    left_out = {"average": "PowerFunction(sigma_rel=0.1)", "sigma_rel": 0.1, "left_out": "why"}
    figure = draw_averages([row, left_out], manifest)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert [line.get_label() for line in ax.lines] == ["1 evaluation, Exponential"]
    said = " ".join(figure.get_supxlabel().split())
    assert all(word in said for word in ("in mine:$f_; reference 0123, n 36", "seed 8", "guidance 1.5"))


def test_averages_are_typed_alone_or_in_brackets_and_survive_json():
    alone = override(TrainConfig(), "averages=PowerFunction(sigma_rel=0.05)")
    assert alone.averages == (PowerFunction(sigma_rel=0.05),)
    several = override(TrainConfig(), "averages=[Exponential(0.9), PowerFunction]")
    assert several.averages == (Exponential(decay=0.9), PowerFunction())
    for config in (alone, several):
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("averages=(Exponential, Exponential)", "averages must differ"),
        ("averages=cauchy", "takes Exponential"),
        ("averages=(PowerFunction, 3)", "takes Exponential"),
        ("averages=Exponential(decay=1)", "decay must be"),
        ("snapshot_every=0", "at least 1"),
    ],
)
def test_averages_that_cannot_be_kept_are_refused(option: str, message: str):
    with pytest.raises(UserError, match=message):
        override(override(TrainConfig(), "averages=PowerFunction"), option)
