"""The command line's options are typed, and a configuration survives JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from reference_trainer.errors import UserError
from reference_trainer.options import differences, from_json, override, to_json
from reference_trainer.presets import PRESETS, digits
from robustcm.flow_targets import Derivative
from robustcm.losses import PerToken, cauchy_of_r2
from robustcm.scales import MeasuredC
from robustcm.schedules import FixedCurriculum, LevelGrid


@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("batch_size=7", lambda c: c.batch_size == 7),
        ("ema_decay=0", lambda c: c.ema_decay == 0.0 and isinstance(c.ema_decay, float)),
        ("optimizer.max_norm=inf", lambda c: c.optimizer.max_norm == math.inf),
        ("non_scaling_norm=true", lambda c: c.non_scaling_norm is True),
        ("optimizer.on_nonfinite=zero", lambda c: c.optimizer.on_nonfinite == "zero"),
        ("optimizer.betas=[0.8,0.9]", lambda c: c.optimizer.betas == (0.8, 0.9)),
        ("objective.c=MeasuredC(multiple=0.5, bins=4)", lambda c: c.objective.c == MeasuredC(multiple=0.5, bins=4)),
        ("objective.c=MeasuredC", lambda c: c.objective.c == MeasuredC()),
        ("objective.distance=PerToken(cauchy_of_r2)", lambda c: c.objective.distance == PerToken(cauchy_of_r2)),
        ("objective=FlowMapObjective(target=Derivative, gate=Above(2))", lambda c: c.objective.target == Derivative()),
        ("objective=TrajectoryObjective(reach=0.5)", lambda c: c.objective.reach == 0.5),
        ("objective.extra=None", lambda c: c.objective.extra is None),
        (
            "objective.levels=LevelGrid(curriculum=FixedCurriculum(num_levels=5))",
            lambda c: c.objective.levels == LevelGrid(curriculum=FixedCurriculum(num_levels=5)),
        ),
    ],
)
def test_an_option_sets_its_field(option: str, read):
    config = override(digits(), option)
    assert read(config)
    assert from_json(json.loads(json.dumps(to_json(config), allow_nan=False))) == config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("objective.c=MesuredC()", "did you mean MeasuredC"),
        ("objective.c=cauchy", "takes ConstantC"),
        ("batchsize=3", "did you mean batch_size"),
        ("batch_size=x", "must be int"),
        ("batch_size=2.5", "must be int"),
        ("batch_size=0", "at least 1"),
        ("batch_size.x=3", "has no fields"),
        ("objective.c=MeasuredC(multiple=-1)", "must be positive"),
        ("objective.c=MeasuredC(multiple='a')", "must be float"),
        ("objective.c=MeasuredC(foo=1)", "has no foo"),
        ("objective.c=__import__('os')", "unknown name"),
        ("objective.c=(1).__class__", "malformed|takes"),
        ("objective.c=MeasuredC(", "cannot read"),
        ("objective.distance=PerToken", "rho"),
        ("autoencoder=PretrainedAutoencoder(load='my_vae')", "module:function"),
        ("objective.distance=cauchy(1)", "no arguments"),
        ("steps", "an option looks like"),
        ("optimizer.on_nonfinite=ignore", "must be"),
        ("objective.levels.curriculum.s0=0", "s0"),
    ],
)
def test_a_bad_option_gets_one_line(option: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        override(digits(), option)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.__name__)
def test_presets_survive_json(preset):
    assert from_json(json.loads(json.dumps(to_json(preset()), allow_nan=False))) == preset()


def test_a_part_only_python_knows_is_named_and_not_imported():
    def my_distance(student, teacher, c):
        raise AssertionError

    config = digits()
    stored = to_json(replace(config, objective=replace(config.objective, distance=my_distance)))
    assert "my_distance" in stored["objective"]["distance"]["part"]
    with pytest.raises(UserError, match="my_distance"):
        from_json(stored)


def test_differences_name_exactly_what_changed():
    old, new = to_json(digits()), to_json(override(digits(), "objective.c=ConstantC"))
    assert list(differences(old, old)) == []
    (line,) = differences(old, new)
    assert line.startswith("objective.c: ")
    assert line.endswith(" -> ConstantC")
