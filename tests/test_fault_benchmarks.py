"""benchmarks/faults say of what they found what it is."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from reference_trainer.config import TrainConfig
from reference_trainer.errors import Terminated
from robustcm.objective import Objective


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks" / "faults"))
    return importlib.import_module("poison")


# --- poison.py -------------------------------------------------------------------------------------------------------

CLEAN = {"1 evaluation": 30.0, "2 evaluations": 20.0}
OTHER = {"1 evaluation": 33.0, "2 evaluations": 22.0}
FINE = {(0, 0.0): (0, CLEAN), (0, 0.01): (8, CLEAN), (1, 0.0): (0, OTHER), (1, 0.01): (7, OTHER)}


def test_poisoned_batches_are_the_same_at_every_call_and_so_many_as_asked(poison: ModuleType):
    config, latents = TrainConfig(objective=Objective(), batch_size=4), torch.zeros(40, 1, 2, 2)
    bad = [
        [not bool(batches(step).x.isfinite().all()) for step in range(100)]
        for batches in (poison.poisoned(share)(config, latents) for share in (0.3, 0.3, 0.0))
    ]
    assert bad[0] == bad[1]
    assert 20 < sum(bad[0]) < 40
    assert sum(bad[2]) == 0


@pytest.mark.parametrize(
    ("changed", "fine"),
    [
        ({}, True),
        ({(1, 0.01): (7, {"1 evaluation": 34.0, "2 evaluations": 21.0})}, True),  # as much as another seed
        ({(1, 0.01): (7, {"1 evaluation": 33.0, "2 evaluations": 33.0})}, False),
        ({(1, 0.01): (0, OTHER)}, False),  # nothing was poisoned
        ({(0, 0.0): (1, CLEAN)}, False),  # or what was to be clean
    ],
)
def test_poison_is_harmless_if_there_was_some_and_it_cost_no_more_than_another_seed(
    changed: dict[tuple[int, float], tuple[int, dict[str, float]]], fine: bool, poison: ModuleType
):
    assert poison.verdict(FINE | changed, 0.01) == fine


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
@pytest.mark.parametrize("finished", [0, 1, 2, 3, 4])
def test_a_poisoning_that_is_stopped_ends_with_the_verdict_on_the_pairs_that_were_finished(
    finished: int,
    stop: type[BaseException],
    poison: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def stopped(_: object, found: dict[tuple[int, float], object]) -> None:
        found |= dict(list(FINE.items())[:finished])
        raise stop

    monkeypatch.setattr(poison, "train_pairs", stopped)
    monkeypatch.setattr("sys.argv", ["poison.py"])
    assert poison.main() == (finished < 2)
    said = capsys.readouterr().out
    assert "interrupted" in said
    assert ("no pair of runs is finished" in said) == (finished < 2)
    assert said.count(f"{finished // 2} paired seeds") == (2 if finished > 1 else 0)
