"""A part of the user's own, once offered, is typed, kept in config.json and read back like any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from reference_trainer import choices
from reference_trainer.choices import offer
from reference_trainer.config import TrainConfig
from reference_trainer.errors import UserError
from reference_trainer.options import from_json, override, to_json
from reference_trainer.presets import digits
from robustcm.losses import cauchy
from robustcm.objective import FewStepObjective


@pytest.fixture(autouse=True)
def _forgotten_afterwards() -> Iterator[None]:
    before = dict(choices.CHOICES), dict(choices.VOCABULARY)
    yield
    for table, was in zip((choices.CHOICES, choices.VOCABULARY), before, strict=True):
        table.clear()
        table.update(was)  # type: ignore[arg-type]


def mine(student, teacher, c):
    return cauchy(student, teacher, 2 * c)


@dataclass(frozen=True)
class Ours:
    width: int = 3


def test_without_an_offer_the_name_is_unknown_and_the_error_says_what_to_do():
    with pytest.raises(UserError, match="unknown name mine"):
        override(digits(), "objective.distance=mine")
    offer(mine, FewStepObjective, "distance")
    kept = to_json(override(digits(), "objective.distance=mine"))
    del choices.VOCABULARY["mine"]
    with pytest.raises(UserError, match=r"names 'mine'.*choices\.offer|names mine.*choices\.offer"):
        from_json(kept)


def test_an_offered_function_is_typed_kept_and_read_back():
    offer(mine, FewStepObjective, "distance")
    offer(mine, FewStepObjective, "distance")  # as a file that is imported twice would
    config = override(digits(), "objective.distance=mine")
    assert config.objective.distance is mine
    assert from_json(to_json(config)) == config
    assert choices.CHOICES[FewStepObjective, "distance"].count(mine) == 1


def test_the_fields_of_an_offered_dataclass_are_options():
    offer(Ours, TrainConfig, "network")
    config = override(override(digits(), "network=Ours"), "network.width=5")
    assert config.network == Ours(5)
    assert from_json(to_json(config)) == config


def test_a_name_that_is_taken_and_a_field_that_takes_no_part_are_refused():
    def cauchy(student, teacher, c): ...

    with pytest.raises(ValueError, match="another name"):
        offer(cauchy, FewStepObjective, "distance")
    with pytest.raises(ValueError, match=r"TrainConfig\.steps takes no part.*FewStepObjective\.distance"):
        offer(mine, TrainConfig, "steps")
