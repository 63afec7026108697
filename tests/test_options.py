"""The command line's options are typed, explained, and a configuration survives JSON and typing."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from reference_trainer.__main__ import main
from reference_trainer.choices import CHOICES, VOCABULARY
from reference_trainer.config import MOST_THREADS, ConstantLR, CosineLR, TrainConfig
from reference_trainer.errors import UserError
from reference_trainer.fields import describe_fields, docs_of
from reference_trainer.optimizers import Adam, Muon, RAdam
from reference_trainer.options import (
    as_options,
    describe,
    differences,
    from_json,
    override,
    to_json,
)
from reference_trainer.presets import PRESETS, digits, flow_map
from reference_trainer.words import with_options
from robustcm.barron import Barron, BarronOfR2
from robustcm.couplers import Entropic
from robustcm.flow_targets import Derivative
from robustcm.losses import PerElement, PerToken, cauchy_of_r2, fair, fair_of_r2
from robustcm.scales import ConstantC, MeasuredC
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
        ("objective.distance=fair", lambda c: c.objective.distance is fair),
        ("objective.distance=PerElement(fair_of_r2)", lambda c: c.objective.distance == PerElement(fair_of_r2)),
        ("objective.distance=Barron(alpha=0.5)", lambda c: c.objective.distance == Barron(alpha=0.5)),
        ("objective.distance=Barron(-2)", lambda c: c.objective.distance == Barron(alpha=-2.0)),
        ("objective.distance=Barron(alpha=-inf)", lambda c: c.objective.distance == Barron(alpha=-math.inf)),
        (
            "objective.distance=PerToken(BarronOfR2(alpha=0.5))",
            lambda c: c.objective.distance == PerToken(BarronOfR2(alpha=0.5)),
        ),
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
    ("options", "path", "held"),
    [
        (["objective.levels=DenoiseFirst(share=0.3)"], "levels.then", digits().objective.levels),
        (["objective.levels=DenoiseFirst"], "levels.then", digits().objective.levels),
        (
            ["objective.levels=DenoiseFirst", "objective.levels=DenoiseFirst(0.5)"],
            "levels.then",
            digits().objective.levels,
        ),
        (["objective.levels=DenoiseFirst(then=LevelGrid)"], "levels.then", LevelGrid()),
        (
            ["objective.coupler=Entropic(reg=0.2)", "objective.coupler=WithinClasses"],
            "coupler.coupler",
            Entropic(reg=0.2),
        ),
        (
            ["objective.c=ConstantC(per_sqrt_d=0.3)", "objective.c=PowerLawC(slope=-1)"],
            "c.constant",
            ConstantC(per_sqrt_d=0.3),
        ),
        (["objective.c=MeasuredC(multiple=3)"], "c.bins", MeasuredC().bins),
    ],
    ids=str,
)
def test_a_part_around_what_was_there_keeps_it_and_takes_nothing_else_over(options: list[str], path: str, held: Any):
    """Else the levels behind a denoiser were a library's, of 641 levels, whatever the preset's."""
    found: Any = with_options(digits(), options).objective
    for name in path.split("."):
        found = getattr(found, name)
    assert found == held


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
        ("objective.c=MeasuredC(multiple=-1)", "multiple must be"),
        ("objective.c=MeasuredC(multiple='a')", "must be float"),
        ("objective.c=MeasuredC(foo=1)", "has no foo"),
        ("objective.c=__import__('os')", "unknown name"),
        ("objective.c=(1).__class__", "cannot read"),
        ("objective.c=MeasuredC(", "cannot read"),
        ("objective.distance=PerToken", "rho"),
        ("autoencoder=PretrainedAutoencoder(load='my_vae')", "module:function"),
        ("objective.distance=cauchy(1)", "no arguments"),
        ("objective.distance=Barron", "alpha"),
        ("objective.distance=Barron(alpha=3)", "at most 2"),
        ("objective.distance=Barron(alpha=-cauchy)", "cannot read"),
        ("objective.distance=BarronOfR2(alpha=1)", "takes"),
        ("steps", "an option looks like"),
        ("optimizer.on_nonfinite=ignore", "must be"),
        ("objective.levels.curriculum.s0=0", "s0"),
        ("objective.c=MeasuredC(histogram=3)", "takes LogHistogram"),
        ("objective.distance=PerToken(rho=cauchy)", "takes pseudo_huber_of_r2"),
        ("objective.c=MeasuredC()(q=0.3)", "takes no arguments"),
        ("objective.c=MeasuredC(1, 0.5, 1, False, 1, LogHistogram, 7)", "6 fields, got 7"),
        ("objective.c=MeasuredC(**{})", "has no None"),
        ("objective.gate=AnnealedAbove", "missing 2 required"),
        ("objective.c=" + "(" * 500, "cannot read"),
        ("steps=" + "-" * 5000 + "1", "must be int"),
        ("steps=0x" + "f" * 5000, "must lie between -2.*63, got a int"),
        ("optimizer.eps=0x" + "f" * 5000, "must lie between"),
        ("seed=9223372036854775808", "must lie between -2.*63"),
        ("steps={[]: 1}", "must be int"),
        ("optimizer.betas=(0.9,)", "must be tuple"),
        ("=3", "unknown option"),
        ("classes.dropout=0.2", "unknown option classes.dropout: classes is None here; give classes=... first"),
        ("..=3", "unknown option"),
        ("objective=ilct", "unknown name ilct"),
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


# --- Every number works or is refused by its owner --------------------------------------------------------------------


def said_by(call: Callable[[], Any], kind: type[Exception]) -> tuple[str, Any]:
    """What ``call`` says when it raises, and what it returns when not."""
    try:
        return "", call()
    except kind as error:
        return str(error), None


EDGES = [math.nan, math.inf, -math.inf, -1, -0.0, 0, 1, 5e-324, 1e308, 2**63 - 1, -(2**63)]
OWNERS = [Adam(), RAdam(), Muon(), ConstantLR(), CosineLR()]


@pytest.mark.parametrize("value", EDGES, ids=str)
@pytest.mark.parametrize(
    ("owner", "field"),
    [(owner, field.name) for owner in OWNERS for field in fields(owner) if field.name not in ("on_nonfinite", "betas")],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_a_number_works_or_is_refused_by_its_owner(owner, field: str, value: float):
    refused, part = said_by(lambda: replace(owner, **{field: value}), ValueError)
    if refused:
        assert field in refused
        return
    if isinstance(part, (ConstantLR, CosineLR)):
        rates = [part(step, 10) for step in range(10)]
        assert all(0 <= rate <= float(part.lr) for rate in rates)
        assert all(math.isfinite(rate) for rate in rates)
    else:
        network = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
        weights = list(network.parameters())
        optimizer = part.build(weights, network)
        optimizer.param_groups[0]["lr"] = 0.1
        for weight in weights:
            weight.data.fill_(1.0)
            weight.grad = torch.eye(2)[: weight.ndim].reshape_as(weight) - 0.5
        torch.nn.utils.clip_grad_norm_(weights, part.max_norm)
        optimizer.step()
        for weight in weights:
            assert not weight.isnan().any()
            assert field != "eps" or (weight != 1).all()  # one without bound would hold every weight


@pytest.mark.parametrize("betas", [(math.nan, 0.9), (0.9, 1), (-0.1, 0.9), (0.9, math.inf)])
def test_averages_that_never_forget_are_refused(betas: tuple[float, float]):
    with pytest.raises(ValueError, match="betas"):
        Adam(betas=betas)


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda field: field.name)
@pytest.mark.parametrize("value", [math.nan, -1, 0, 2**62], ids=str)
def test_a_run_has_counts_that_can_be_counted_to(field: Field[Any], value: float):
    if type(getattr(digits(), field.name)) in (int, float) and field.name != "seed":
        with suppress(ValueError):
            config = replace(digits(), **{field.name: value})
            assert value > 0 or (field.name in ("ema_decay", "evaluate_every") and value == 0)
            assert config.threads <= MOST_THREADS
            assert config.ema_decay < 1


# --- Every field is explained -----------------------------------------------------------------------------------------


def is_part(value: Any) -> bool:
    return isinstance(value, type) and is_dataclass(value)


PARTS = dict.fromkeys([TrainConfig, *(owner for owner, _ in CHOICES), *filter(is_part, VOCABULARY.values())])


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_field_has_a_line_of_what_it_does(part: type):
    docs = docs_of(part)
    assert [field.name for field in fields(part) if not docs.get(field.name)] == []


def test_fields_lists_all_of_them_with_value_and_kind():
    text = describe_fields(digits())
    for part in PARTS:
        for name, line in docs_of(part).items():
            assert re.search(rf"^ *[\w.]*\b{name}=\S", text, re.MULTILINE), (part, name)
            assert " ".join(line.split()[:3]) in " ".join(text.split())
    for owner, name in CHOICES:
        assert describe(CHOICES[owner, name]) in " ".join(text.split())


def test_fields_below_a_path_are_the_part_and_what_could_stand_there():
    text = describe_fields(digits(), "objective.c")
    assert text.startswith("objective.c=MeasuredC(...)\n")
    assert "objective.c.multiple=0.7\n" in text
    assert "objective.c=PowerLawC(...)" in text
    assert "objective.c.slope=-1.15\n" in text
    assert "learning_rate" not in text
    assert describe_fields(digits(), "steps").startswith("steps=4000\n    Training steps")
    with pytest.raises(UserError, match="did you mean steps"):
        describe_fields(digits(), "stps")


# --- Typed again ------------------------------------------------------------------------------------------------------

CHANGES = [
    *("steps=7", "second_sigma=0.5", "clip=None", "outliers=ImpulsiveOutliers", "optimizer=RAdam(max_norm=inf)"),
    *("network=UNet(block_out_channels=(8,), attention=(False,))", "autoencoder=PretrainedAutoencoder(load='a b:c')"),
    *("objective.gate=AnnealedAbove(3, 0.5)", "objective.distance=PerToken(cauchy_of_r2)", "objective.c=PowerLawC"),
    *("objective.levels=RatioLevels", "objective.extra=EarlyDiffusion", "objective.coupler=WithinClasses(Entropic())"),
    *("objective.levels.curriculum=DoublingCurriculum(s0=700, s1=900)", "data=ImageFolder(path='it\\'s \"here\"')"),
    *("objective=FlowMapObjective(target=Derivative)", "objective.target=TwoPoint(ConstantShare(0.5))"),
    *("averages=(PowerFunction(sigma_rel=0.05), Exponential)", "averages=PowerFunction", "snapshot_every=10"),
    *("objective=TrajectoryObjective(reach=0.5)", "objective=Objective(c=PowerLawC)", "objective.reach=1"),
]


@given(st.sampled_from(PRESETS), st.lists(st.sampled_from(CHANGES)), st.sampled_from(PRESETS))
@example(digits, ["second_sigma=0.5"], flow_map)
def test_what_is_shown_can_be_typed_again_whatever_the_preset(preset, changes: list[str], other):
    config = preset()
    for change in changes:
        with suppress(UserError):  # a part chosen before that has no such field
            config = override(config, change)
    again = other()
    for option in shlex.split(shlex.join(as_options(config))):
        again = override(again, option)
    assert again == config


# --- Whatever is typed, or stands in a file ---------------------------------------------------------------------------


def paths_of(part: Any, path: str = "") -> list[str]:
    found = []
    for field in fields(part):
        value = getattr(part, field.name)
        found += [path + field.name, *(paths_of(value, f"{path}{field.name}.") if is_dataclass(value) else ())]
    return found


JUNK = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.one_of(
    st.integers().map(str), st.floats().map(str), st.sampled_from(["1e999", "-1", "0", "1_0", "0x1", "1j"])
)
NAMES = st.sampled_from([*VOCABULARY, "None", "True", "true", "nan", "-inf", "zero"])
VALUES = st.recursive(
    NUMBERS | NAMES | JUNK,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"({', '.join(items)})"),
        st.tuples(NAMES, st.lists(inner, max_size=2)).map(lambda call: f"{call[0]}({', '.join(call[1])})"),
        st.tuples(NAMES, st.sampled_from([*{f.name for part in PARTS for f in fields(part)}]), inner).map(
            lambda call: f"{call[0]}({call[1]}={call[2]})"
        ),
    ),
    max_leaves=4,
)
ASSIGNMENTS = st.tuples(st.sampled_from(paths_of(digits())) | JUNK, VALUES).map("=".join)
WORDS = st.one_of(
    ASSIGNMENTS,
    JUNK,
    st.sampled_from(
        [*("ilct", "paper", "digits", "train", "sample", "ablate", "help", "--", "-", "--brief", "--fields")]
    ),
    st.tuples(st.sampled_from(["--data", "--out", "--device", "--features", "--fields", "--n", "--x"]), JUNK).map(
        "=".join
    ),
)


@given(st.lists(WORDS, max_size=4), st.booleans())
@example(["--data=" + "x" * 200], True)
@example(["--", "steps=3"], True)
def test_whatever_is_typed_is_shown_or_refused_in_one_line(words: list[str], first: bool):
    out, error = io.StringIO(), io.StringIO()
    words = [word for word in words if word != "--debug"]
    with redirect_stdout(out), redirect_stderr(error):
        try:
            status = main(["train", "--show", *words] if first else ["train", *words, "--show"])
        except SystemExit as end:  # --help
            status = end.code
    lines = [line for line in error.getvalue().splitlines() if "given more than once" not in line]
    assert status in (0, 2), lines
    assert len(lines) == (status == 2), lines
    assert bool(out.getvalue()) == (status == 0)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | NAMES.map(lambda name: {"part": name}),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["part", "steps", "lr"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@given(st.sampled_from(PRESETS), st.data())
def test_a_configuration_changed_by_hand_is_read_or_refused_in_one_line(preset, data: st.DataObject):
    stored = json.loads(json.dumps(to_json(preset())))
    node = stored
    *above, last = data.draw(st.sampled_from(paths_of(preset()))).split(".")
    for step in above:
        node = node[step]
    node[last] = data.draw(JSON)
    refused, config = said_by(lambda: from_json(stored), UserError)
    assert "\n" not in refused
    if not refused:
        assert from_json(json.loads(json.dumps(to_json(config), allow_nan=False))) == config
