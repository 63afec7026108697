"""Processes that share a run's micro-batches train as one would, and one that is gone is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_bad_steps import poison

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder, ImageSet
from reference_trainer.errors import UserError
from reference_trainer.evaluation.evaluate import Evaluator, evaluate
from reference_trainer.files import load_tensors, save_tensors
from reference_trainer.model import load_model
from reference_trainer.networks import DiT, UNet
from reference_trainer.optimizers import Adam, Muon
from reference_trainer.ranks import Ranks
from reference_trainer.run import RunFolder
from reference_trainer.sharding import require_shardable
from reference_trainer.training.batches import Batches
from reference_trainer.training.loop import train
from reference_trainer.training.state import TrainState
from robustcm.averages import PowerFunction
from robustcm.couplers import exact
from robustcm.flow_maps import FlowMapObjective
from robustcm.flow_targets import Derivative
from robustcm.gates import Above
from robustcm.objective import Objective, draw
from robustcm.scales import MeasuredC

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    return TrainConfig(
        data=ImageFolder(path=str(folder), resolution=16),
        autoencoder=PixelSpace(),
        clip=None,
        network=UNet(block_out_channels=(8,), attention=(False,), norm_num_groups=4, dropout=0.1),
        objective=Objective(c=MeasuredC(bins=2), coupler=exact, gate=Above(0.5)),
        coupling_pool=2,
        averages=(PowerFunction(sigma_rel=0.1),),
        snapshot_every=3,
        batch_size=8,
        micro_batches=4,
        steps=6,
        log_every=3,
        save_every=2,
        evaluate_every=3,
    )


def run(config: TrainConfig, root: Path, ranks: Ranks, sharded: bool = False) -> None:
    folder, images = RunFolder(root), config.data.load()
    if ranks.leads:
        folder.root.mkdir(exist_ok=True)
        folder.claim(config)
    train(config, folder, images, root / "cache", CPU, Evaluator(folder, images), ranks=ranks, sharded=sharded)


def with_muon(config: TrainConfig) -> TrainConfig:
    """``config`` with Muon, and a network most of whose weights it moves."""
    network = DiT(width=16, layers=1, heads=2, patch=8)
    return replace(config, optimizer=Muon(), network=network, evaluate_every=0)


def kill_behind_step_4(root: Path, copy: Path) -> None:
    """``copy``: the run as it was when its last checkpoint but one was saved."""
    shutil.copytree(root, copy)
    (copy / "checkpoints" / "step_00000006.safetensors").unlink()


def one_of_two(rank: int, root: Path, config: TrainConfig) -> None:
    """What each process does: train; again from a checkpoint in the middle; then the second dies."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = (root / "port").read_text()
    ranks = Ranks.join(CPU)
    run(config, root / "two", ranks)
    with ranks.first_leads():
        if ranks.leads:
            kill_behind_step_4(root / "two", root / "continued")
    run(config, root / "continued", ranks)
    run(config, root / "sharded", ranks, sharded=True)
    with ranks.first_leads():
        if ranks.leads:
            kill_behind_step_4(root / "two", root / "then sharded")
    run(config, root / "then sharded", ranks, sharded=True)
    run(with_muon(config), root / "muon", ranks)
    ranks.wait()
    figures = evaluate(load_model(RunFolder(root / "two"), CPU), many(), Thumbs(), bounds=False, ranks=ranks)
    (root / f"figures of rank {rank}").write_text(json.dumps(figures))
    one_bad_part(config, root, ranks)
    with pytest.raises(UserError) as refused:
        run(replace(config, micro_batches=1), root / "refused", ranks)
    (root / f"refusal of rank {rank}").write_text(str(refused.value))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ranks.add_up([torch.ones(3)])
    except UserError as error:
        (root / "said").write_text(str(error))


def one_bad_part(config: TrainConfig, root: Path, ranks: Ranks) -> None:
    """A run in whose third step one value of the second rank's part is NaN, and what either rank has at its end."""
    with pytest.MonkeyPatch.context() as patch:
        poison([3], patch, parts=[1])
        whole, ends = TrainState.tensors, []
        patch.setattr(TrainState, "tensors", lambda state: ends.append(whole(state)) or ends[-1])
        run(replace(config, micro_batches=2, evaluate_every=0), root / "one bad part", ranks)
    save_tensors(root / f"end of rank {ranks.rank}", ends[-1], {})


class Thumbs:
    """Features: the mean of every 4 x 4 pixels."""

    name = "thumbs"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float(), 4).flatten(1)


def many() -> ImageSet:
    """As many as make two blocks for the samples, and the second one short."""
    pixels = torch.randint(0, 256, (600, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageSet("noise", pixels, None, torch.arange(600) % 10 == 9)


@pytest.fixture(scope="module")
def two(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have done all that ``one_of_two`` does."""
    root = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (root / "port").write_text(str(free.getsockname()[1]))
    forked = mp.start_processes(one_of_two, (root, config), nprocs=2, join=False, start_method="fork")
    for process in forked.processes:  # torch is imported already
        process.join(200)
    return root


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    found = RunFolder(root).latest_checkpoint()
    assert found is not None
    assert found[0] == 6
    return found[1]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    weights = [name for name in one if name.startswith(("network/", "ema/"))]
    assert weights
    for name in weights:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5, msg=name)


def test_two_processes_train_as_one_does(config: TrainConfig, two: Path, tmp_path: Path):
    run(config, tmp_path / "alone", Ranks())
    assert_close(tensors_of(two / "two"), tensors_of(tmp_path / "alone"))
    rows, alone = (RunFolder(folder).metrics() for folder in (two / "two", tmp_path / "alone"))
    assert len(rows) == 2
    for row, its in zip(rows, alone, strict=True):
        assert row["consistency"] == pytest.approx(its["consistency"], rel=1e-5)
        assert row["c"] == pytest.approx(its["c"], rel=1e-5)
        assert row["r"] == pytest.approx(its["r"], rel=1e-5)


def test_two_processes_train_with_muon_as_one_does(config: TrainConfig, two: Path, tmp_path: Path):
    run(with_muon(config), tmp_path / "alone", Ranks())
    tensors = tensors_of(tmp_path / "alone")
    assert_close(tensors_of(two / "muon"), tensors)
    assert len([name for name in tensors if name.endswith("/momentum")]) == 6


def test_two_processes_continue_to_the_same_bits(two: Path):
    whole, after = tensors_of(two / "two"), tensors_of(two / "continued")
    assert [name for name in whole if not torch.equal(whole[name], after[name])] == []
    first, again = (RunFolder(two / name).metrics() for name in ("two", "continued"))
    assert [row["by_level"] for row in first] == [row["by_level"] for row in again]


def test_one_process_goes_on_where_two_stopped(config: TrainConfig, two: Path, tmp_path: Path):
    kill_behind_step_4(two / "two", tmp_path / "run")
    run(config, tmp_path / "run", Ranks())
    assert_close(tensors_of(two / "two"), tensors_of(tmp_path / "run"))


def test_a_sharded_network_trains_as_a_whole_one_does(two: Path):
    assert_close(tensors_of(two / "sharded"), tensors_of(two / "two"))
    (of_two,), (of_sharded,) = (RunFolder(two / name).snapshots().values() for name in ("two", "sharded"))
    averages, sharded = load_tensors(of_two)[0], load_tensors(of_sharded)[0]
    assert averages.keys() == sharded.keys()
    for name, tensor in averages.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_a_run_changes_between_whole_and_sharded(config: TrainConfig, two: Path, tmp_path: Path):
    assert_close(tensors_of(two / "then sharded"), tensors_of(two / "two"))
    kill_behind_step_4(two / "sharded", tmp_path / "run")
    run(config, tmp_path / "run", Ranks())
    assert_close(tensors_of(tmp_path / "run"), tensors_of(two / "sharded"))


def test_a_network_is_not_sharded_over_one_process(config: TrainConfig, tmp_path: Path):
    with pytest.raises(UserError, match="start it with torchrun"):
        run(config, tmp_path / "run", Ranks(), sharded=True)


@pytest.mark.parametrize(
    ("changed", "optimizer", "micro_batches", "what"),
    [
        ({}, Adam(), 3, "set micro_batches to a multiple of 2"),
        ({"target": Derivative()}, Adam(), 4, "take objective.target=TwoPoint"),
        ({}, Muon(), 4, "take optimizer='Adam"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changed: dict[str, Any], optimizer: Adam, micro_batches: int, what: str):
    with pytest.raises(UserError, match=what):
        require_shardable(FlowMapObjective(**changed), optimizer, micro_batches, Ranks(0, 2))


def test_two_processes_evaluate_to_the_digits_of_one(two: Path):
    alone = evaluate(load_model(RunFolder(two / "two"), CPU), many(), Thumbs(), bounds=False)
    assert alone["rows"]["2 evaluations"]["n"] == 540
    assert json.loads((two / "figures of rank 0").read_text()) == json.loads(json.dumps(alone))
    assert (two / "figures of rank 1").read_text() == "{}"


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_samples_are_judged_while_several_processes_train(two: Path, name: str):
    (row,) = RunFolder(two / name).evaluations()
    assert row["step"] == 3
    assert row["rows"]["1 evaluation"]["n"] == 36


def test_a_part_that_is_not_finite_on_one_rank_is_a_bad_step_of_both(two: Path):
    one, other = (load_tensors(two / f"end of rank {rank}")[0] for rank in (0, 1))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert all(tensor.isfinite().all() for tensor in one.values())
    assert int(one["num_bad_steps"]) == 1
    (row,) = RunFolder(two / "one bad part").rows("bad_steps.jsonl")
    assert (row["step"], row["samples"]) == (3, 1)


def test_what_all_ranks_are_refused_the_leading_one_says(two: Path):
    assert "set micro_batches to a multiple of 2" in (two / "refusal of rank 0").read_text()
    assert (two / "refusal of rank 1").read_text() == ""


@given(works=st.integers(0, 7))
def test_one_process_takes_every_turn(works: int):
    assert list(Ranks().in_turns([partial(int, i) for i in range(works)])) == list(range(works))


def test_turns_end_where_they_are_stopped():
    done = list[int]()
    assert list(Ranks().in_turns([partial(done.append, i) for i in range(5)], lambda: len(done) == 2)) == [None] * 2
    assert done == [0, 1]


def test_a_rank_that_dies_is_named_by_those_that_are_left(two: Path):
    assert (two / "said").read_text().startswith("rank 1 of 2 is gone, so rank 0 stops")


@given(micro_batches=st.integers(1, 40), world=st.integers(1, 40))
def test_the_ranks_share_out_the_micro_batches(micro_batches: int, world: int):
    if micro_batches < world:
        with pytest.raises(UserError, match="set micro_batches"):
            Ranks(0, world).parts(micro_batches)
        return
    shares = [Ranks(rank, world).parts(micro_batches) for rank in range(world)]
    assert [part for share in shares for part in share] == list(range(micro_batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_rank_draws_the_rows_that_one_process_would_give_that_part(config: TrainConfig):
    latents = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    everything, second = Batches(config, latents), Batches(config, latents, parts=[2, 3])
    for step in (0, 1, 5):
        for part in (2, 3):
            assert torch.equal(everything(step, part).x, second(step, part).x)
            assert torch.equal(everything(step, part).z, second(step, part).z)
    x = torch.cat([everything(step, part).x for step in range(5) for part in range(4)])
    assert torch.equal(x.unique(dim=0), latents.unique(dim=0))  # 5 steps of 8 are an epoch of 40, whatever the parts


def test_no_two_blocks_share_a_number():
    blocks = [draw(seed, step, (64,), block) for seed in range(3) for step in range(3) for block in range(3)]
    z = torch.cat([block.z for block in blocks])
    assert len(z.unique()) == len(z)


def test_ranks_that_found_other_checkpoints_do_not_go_on(monkeypatch: pytest.MonkeyPatch):
    def gathered(into: list[int], own: int) -> None:
        into[:] = [own, 4]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    Ranks(0, 2).require_same(4, "checkpoints", "one folder")
    with pytest.raises(UserError, match=r"found different checkpoints, \[6, 4\]: give one folder"):
        Ranks(0, 2).require_same(6, "checkpoints", "one folder")
