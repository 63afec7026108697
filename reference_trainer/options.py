"""Typed options: `path.to.field=value` on the command line, and a configuration as JSON and back.

A value is a Python literal, or, where a part can be exchanged (a distance, a schedule, a network), an expression
over the names in ``CHOICES``, such as ``objective.c=MeasuredC(multiple=0.5)``. Nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from reference_trainer.config import Adam, ConstantLR, CosineLR, RAdam, TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder, PixelSpace, PretrainedAutoencoder
from reference_trainer.data.images import Digits, ImageFolder
from reference_trainer.data.latents import ImpulsiveOutliers
from reference_trainer.errors import UserError
from reference_trainer.networks import DiT, UNet
from robustcm import (
    couplers,
    early,
    fences,
    flow_maps,
    flow_targets,
    gates,
    losses,
    noise,
    objective,
    scales,
    schedules,
    sketch,
    trajectories,
)

RHOS = (losses.pseudo_huber_of_r2, losses.cauchy_of_r2, losses.geman_mcclure_of_r2, losses.squared_l2_of_r2)

CHOICES: dict[tuple[type, str], tuple[Any, ...]] = {
    (TrainConfig, "data"): (Digits, ImageFolder),
    (TrainConfig, "autoencoder"): (KLAutoencoder, PretrainedAutoencoder, PixelSpace),
    (TrainConfig, "outliers"): (None, ImpulsiveOutliers),
    (TrainConfig, "clip"): (None, fences.ConditionalClip, fences.TukeyClip),
    (TrainConfig, "network"): (DiT, UNet),
    (TrainConfig, "objective"): (
        *(objective.Objective, flow_maps.FlowMapObjective),
        trajectories.TrajectoryObjective,
    ),
    (TrainConfig, "optimizer"): (Adam, RAdam),
    (TrainConfig, "learning_rate"): (CosineLR, ConstantLR),
    (objective.FewStepObjective, "distance"): (
        *(losses.pseudo_huber, losses.cauchy, losses.geman_mcclure, losses.squared_l2),
        *(losses.PerToken, losses.PerElement),
    ),
    (objective.FewStepObjective, "c"): (scales.ConstantC, scales.PowerLawC, scales.MeasuredC),
    (objective.Objective, "levels"): (schedules.LevelGrid, schedules.RatioLevels),
    (trajectories.TrajectoryObjective, "levels"): (schedules.LevelGrid, schedules.RatioLevels),
    (flow_maps.FlowMapObjective, "levels"): (flow_maps.LogitNormalTimes,),
    (flow_maps.FlowMapObjective, "target"): (flow_targets.TwoPoint, flow_targets.Derivative),
    (flow_targets.TwoPoint, "share"): (flow_targets.SigmoidShare, flow_targets.ConstantShare),
    (trajectories.TrajectoryObjective, "ends"): (trajectories.UniformEnds,),
    (objective.FewStepObjective, "weight"): (
        *(schedules.inverse_gap, schedules.equal_weight),
        *(schedules.BoundedInverseGap, schedules.SnrPlusWeight),
    ),
    (objective.FewStepObjective, "coupler"): (
        *(couplers.independent, couplers.exact),
        *(couplers.Entropic, couplers.WithinClasses),
    ),
    (objective.FewStepObjective, "gate"): (
        *(gates.everywhere, gates.Above, gates.SoftAbove, gates.AnnealedAbove, gates.ShareAbove),
        gates.AboveExplained,
    ),
    (objective.Objective, "extra"): (None, early.EarlyDiffusion),
    (couplers.WithinClasses, "coupler"): (couplers.exact, couplers.Entropic),
    (scales.PowerLawC, "constant"): (scales.ConstantC,),
    (scales.MeasuredC, "histogram"): (sketch.LogHistogram,),
    (losses.PerToken, "rho"): RHOS,
    (losses.PerElement, "rho"): RHOS,
    (schedules.LevelGrid, "noise"): (noise.NoiseRange,),
    (schedules.RatioLevels, "noise"): (noise.NoiseRange,),
    (schedules.LevelGrid, "curriculum"): (
        *(schedules.DoublingCurriculum, schedules.ProgressiveCurriculum),
        schedules.FixedCurriculum,
    ),
    (schedules.LevelGrid, "law"): (schedules.LognormalLaw, schedules.UniformLaw),
}
"""For each exchangeable field, the parts the command line and config.json know. From Python any callable goes.

What a field of a class takes, its subclasses' take, where they say nothing else.
"""

VOCABULARY: dict[str, Any] = {part.__name__: part for parts in CHOICES.values() for part in parts if part is not None}
VOCABULARY["inf"] = math.inf  # JSON has no literal for it


def override(config: TrainConfig, option: str) -> TrainConfig:
    """``config`` with one ``path.to.field=value`` applied.

    Raises:
        UserError: unknown path, a value that cannot be read, is of the wrong type or refused by its owner.
    """
    path, equals, text = option.partition("=")
    if not equals:
        raise UserError(f"cannot read {option!r}: an option looks like batch_size=64 or objective.distance=cauchy")
    return typing.cast(TrainConfig, _replace(config, path, path.split("."), text))


def _replace(owner: Any, path: str, names: list[str], text: str) -> Any:
    head, *rest = names
    fields = {field.name: field for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
    if head not in fields:
        near = difflib.get_close_matches(head, fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"{_name(owner)} has {', '.join(fields) or 'no fields'}"
        raise UserError(f"unknown option {path}: {hint}")
    value = _replace(getattr(owner, head), path, rest, text) if rest else _read(type(owner), head, text, path)
    try:
        return dataclasses.replace(owner, **{head: value})
    except ValueError as error:
        raise UserError(f"option {path}={text}: {error}") from error


def _read(owner: type, field: str, text: str, path: str) -> Any:
    hint = typing.get_type_hints(owner)[field]
    choices = choices_of(owner, field)
    if choices is None:
        if hint is str:
            return text
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False, "none": None, "inf": float("inf")}.get(text.lower(), text)
        return _fit(value, hint, f"option {path}")
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise UserError(f"option {path}: cannot read {text!r} as a value") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"option {path}={text}: {error}") from error
    if isinstance(value, type):  # PowerLawC for PowerLawC()
        try:
            value = value()
        except TypeError as error:
            raise UserError(f"option {path}={text}: {error}") from error
    if not any(value is choice or (isinstance(choice, type) and isinstance(value, choice)) for choice in choices):
        raise UserError(f"option {path} takes {describe(choices)}; got {text}")
    return value


def choices_of(owner: Any, field: str) -> tuple[Any, ...] | None:
    """The parts that ``field`` of the class ``owner`` takes; None: it takes a plain value."""
    return next((CHOICES[base, field] for base in owner.__mro__ if (base, field) in CHOICES), None)


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        if node.id not in VOCABULARY:
            near = difflib.get_close_matches(node.id, VOCABULARY, 1)
            raise ValueError(f"unknown name {node.id}" + (f", did you mean {near[0]}?" if near else ""))
        return VOCABULARY[node.id]
    if isinstance(node, ast.Call):
        return _build(
            _evaluate(node.func),
            [_evaluate(argument) for argument in node.args],
            {str(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords},
        )
    return ast.literal_eval(node)


def _build(part: Callable[..., Any], positional: list[Any], keywords: dict[str, Any]) -> Any:
    if not dataclasses.is_dataclass(part):
        raise ValueError(f"{_name(part)} takes no arguments here")
    names = [field.name for field in dataclasses.fields(part)]
    given = dict(zip(names, positional, strict=False)) | keywords
    unknown = set(given) - set(names)
    if unknown or len(positional) > len(names):
        raise ValueError(
            f"{_name(part)} has no {', '.join(sorted(unknown)) or 'such argument'}; it has {', '.join(names)}"
        )
    hints = typing.get_type_hints(part)
    fitted = {}
    for name, value in given.items():
        if choices_of(part, name) is not None:
            fitted[name] = value() if isinstance(value, type) else value
        else:
            fitted[name] = _fit(value, hints[name], f"{_name(part)}({name}=...)")
    return part(**fitted)


def _fit(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint`` says; ints count as floats, lists as tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            try:
                return _fit(value, argument, where)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(_fit(v, i, where) for v, i in zip(value, inner, strict=True))
    elif (hint is float and type(value) in (int, float)) or (hint is int and type(value) is int):
        return hint(value)
    elif hint in (bool, str) and type(value) is hint:
        return value
    elif hint is type(None) and value is None:
        return None
    expected = str(hint).replace("typing.", "") if origin else getattr(hint, "__name__", str(hint))
    raise UserError(f"{where} must be {expected}, got {value!r}")


def describe(choices: tuple[Any, ...]) -> str:
    """The choices as one would type them."""
    return ", ".join(
        "None" if c is None else f"{c.__name__}(...)" if isinstance(c, type) else c.__name__ for c in choices
    )


def to_json(value: Any) -> Any:
    """A configuration as JSON: parts become ``{"part": name, field: ...}``, functions their name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"part": _name(type(value)), **fields}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if value == math.inf:
        return {"part": "inf"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"part": _name(value)}


def from_json(data: Any) -> Any:
    """The inverse of ``to_json`` for configurations made of known parts.

    Raises:
        UserError: a part that only Python knew, or a field this version does not have.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    name = data.get("part")
    part = TrainConfig if name == "TrainConfig" else VOCABULARY.get(str(name))
    if part is None:
        raise UserError(
            f"the configuration names {name!r}, which is no part of this version: use the run from Python if the part "
            "is yours, else with the version that made it"
        )
    if not dataclasses.is_dataclass(part):
        return part
    try:
        return part(**{key: from_json(item) for key, item in data.items() if key != "part"})
    except (TypeError, ValueError) as error:
        raise UserError(f"the configuration does not fit this version: {error}") from error


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """``path: old -> new`` for every leaf in which two ``to_json`` trees differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("part") == new.get("part"):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    return str(value["part"]) if isinstance(value, dict) and "part" in value else str(value)


def _name(part: Any) -> str:
    name = str(getattr(part, "__name__", ""))
    if part is TrainConfig or VOCABULARY.get(name) is part:
        return name
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _name(type(part))
    return f"{getattr(part, '__module__', '?')}:{getattr(part, '__qualname__', repr(part))}"
