"""Typed options: `path.to.field=value` on the command line, and a configuration as JSON and back.

A value is a Python literal, or, where a part can be exchanged (a distance, a schedule, a network), an expression
over the names of choices.py, such as ``objective.c=MeasuredC(multiple=0.5)``. Nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reference_trainer.choices import CHOICES, VOCABULARY
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PretrainedAutoencoder
from reference_trainer.data.from_diffusers import DiffusersAutoencoder
from reference_trainer.errors import UserError


def autoencoder_option(word: str) -> str:
    """What ``--autoencoder WORD`` says: a part, ``module:function``, a folder of diffusers', a hub name, or a field of
    the one there is: ``steps=1100``."""
    folder = Path(word).expanduser()
    if "=" in word and word.partition("=")[0].isidentifier() and not folder.is_dir():
        return f"autoencoder.{word}"
    if "(" in word or word in VOCABULARY:
        return f"autoencoder={word}"
    if folder.is_dir() or ("/" in word and ":" not in word):
        name = str(folder.resolve()) if folder.is_dir() else word
        return f"autoencoder={literal(DiffusersAutoencoder(name=name))}"
    return f"autoencoder={literal(PretrainedAutoencoder(load=word)) if ':' in word else word}"


def override(config: TrainConfig, option: str) -> TrainConfig:
    """``config`` with one ``path.to.field=value`` applied.

    Raises:
        UserError: unknown path, a value that cannot be read, is of the wrong type or refused by its owner.
    """
    path, equals, text = option.partition("=")
    if not equals:
        raise UserError(f"cannot read {option!r}: an option looks like batch_size=64 or objective.distance=cauchy")
    return typing.cast(TrainConfig, _replace(config, path, path.split("."), text))


def field_of(owner: Any, name: str, path: str) -> Any:
    """What ``owner``, a part of a configuration, has in its field ``name``.

    Raises:
        UserError: it has no such field; ``path`` is what was asked for.
    """
    fields = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    if owner is None:
        part = path.rpartition(f".{name}")[0]
        raise UserError(f"unknown option {path}: {part} is None here; give {part}=... first")
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"{_name(owner)} has {', '.join(fields) or 'no fields'}"
        raise UserError(f"unknown option {path}: {hint}")
    return getattr(owner, name)


def _replace(owner: Any, path: str, names: list[str], text: str) -> Any:
    head, *rest = names
    value = field_of(owner, head, path)
    value = _replace(value, path, rest, text) if rest else _read(type(owner), head, text, path, value)
    try:
        return dataclasses.replace(owner, **{head: value})
    except ValueError as error:
        raise UserError(f"option {path}={_shown(text)}: {error}") from error


def _read(owner: type, field: str, text: str, path: str, before: Any) -> Any:
    """``text`` as a value of ``owner.field``, which has been ``before``."""
    where = f"option {path}"
    exchangeable, hint = choices_of(owner, field) is not None, typing.get_type_hints(owner)[field]
    there = _There(before, choices_of(owner, field) or ())
    if hint is str:
        return text
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body, there) if exchangeable else ast.literal_eval(text)
    except UserError as error:
        raise UserError(f"{where}={_shown(text)}: {error}") from error
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:  # all that ast may raise
        if exchangeable:
            raise UserError(f"{where}: cannot read {_shown(text)} as a value") from error
        value = {"true": True, "false": False, "none": None, "inf": math.inf}.get(text.lower(), text)
    return _fitted(owner, field, value, where)


def choices_of(owner: Any, field: str) -> tuple[Any, ...] | None:
    """The parts that ``field`` of the class ``owner`` takes; None: it takes a plain value."""
    return next((CHOICES[base, field] for base in owner.__mro__ if (base, field) in CHOICES), None)


class _There(typing.NamedTuple):
    """What a part is put in the place of, and what else could stand there."""

    before: Any
    choices: tuple[Any, ...]


def _evaluate(node: ast.expr, there: _There | None = None) -> Any:
    """The value that ``node`` writes down; of a part, put in the place of what is ``there``."""
    if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-inf":
        return -math.inf
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_evaluate(element) for element in node.elts)
    if isinstance(node, ast.Name):
        if node.id not in VOCABULARY:
            near = difflib.get_close_matches(node.id, VOCABULARY, 1)
            hint = f", did you mean {near[0]}?" if near else "; a part of your own: see docs/how-to/network.md"
            raise UserError(f"unknown name {node.id}{hint}")
        part = VOCABULARY[node.id]
        return _build(part, kept) if _is_part(part) and (kept := _wrapped(part, {}, there)) else part
    if isinstance(node, ast.Call):
        part = _evaluate(node.func)
        positional = [_evaluate(argument) for argument in node.args]
        keywords = {str(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords}
        if not _is_part(part):
            raise UserError(f"{_shown(_name(part))} takes no arguments here")
        names = [field.name for field in dataclasses.fields(part)]
        if len(positional) > len(names):
            raise UserError(f"{_name(part)} has {len(names)} fields, got {len(positional)} values")
        given = dict(zip(names, positional, strict=False)) | keywords
        return _build(part, given | _wrapped(part, given, there))
    return ast.literal_eval(node)


def _wrapped(part: type, given: Mapping[str, Any], there: _There | None) -> dict[str, Any]:
    """What a ``part`` takes over from the one before it: that itself, in a field that can hold it and is not ``given``.

    So ``levels=DenoiseFirst(share=0.2)`` goes on with the levels there were, and not with a library's.
    """
    if there is None:
        return {}
    kept = {}
    for name in (field.name for field in dataclasses.fields(part) if field.name not in given):
        inside = getattr(there.before, name) if isinstance(there.before, part) else there.before
        if all(_is_choice(inside, choices) for choices in (there.choices, choices_of(part, name) or ())):
            kept[name] = inside
    return kept


def _is_choice(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(value is choice or (isinstance(choice, type) and isinstance(value, choice)) for choice in choices)


def _is_part(value: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value)


def _build(part: type, given: dict[str, Any]) -> Any:
    """``part`` with the fields ``given``, their types checked.

    Raises:
        UserError: an unknown field, one that is missing, or a value of the wrong type or refused by the part.
    """
    names = [field.name for field in dataclasses.fields(part)]
    if unknown := sorted(given.keys() - set(names)):
        raise UserError(f"{_name(part)} has no {', '.join(map(_shown, unknown))}; it has {', '.join(names) or 'none'}")
    fitted = {name: _fitted(part, name, value, f"{_name(part)}({name}=...)") for name, value in given.items()}
    try:
        return part(**fitted)
    except (TypeError, ValueError) as error:
        raise UserError(str(error).replace("__init__() ", " ")) from error


def _fitted(owner: type, field: str, value: Any, where: str) -> Any:
    """``value`` as ``owner.field`` takes it: one of its choices, or of its type."""
    choices = choices_of(owner, field)
    hint = typing.get_type_hints(owner)[field]
    if choices is None:
        return _fit(value, hint, where)
    if typing.get_origin(hint) is tuple:  # any number of parts; one may stand without its brackets
        return tuple(_chosen(part, choices, where) for part in (value if isinstance(value, tuple) else (value,)))
    return _chosen(value, choices, where)


def _chosen(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    """``value`` if it is one of ``choices`` or an instance of one."""
    if _is_part(value):  # PowerLawC for PowerLawC()
        value = _build(value, {})
    if not _is_choice(value, choices):
        raise UserError(f"{where} takes {describe(choices)}; got {_shown(literal(value))}")
    return value


def _fit(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint`` says; ints count as floats, lists as tuples. NaN is no number."""
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
    elif hint is float and type(value) in (int, float):
        if abs(value) < 2**63 or (isinstance(value, float) and not math.isnan(value)):
            return float(value)
    elif hint is int and type(value) is int:
        if abs(value) < 2**63:  # as wide as torch's
            return value
    elif hint in (bool, str) and type(value) is hint:
        return value
    elif hint is type(None) and value is None:
        return None
    if type(value) is int and hint in (int, float):
        raise UserError(f"{where} must lie between -2**63 and 2**63, got {_shown(value)}")
    raise UserError(f"{where} must be {typed(hint)}, got {_shown(value)}")


def typed(hint: Any) -> str:
    """A type as a person reads it."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))


def describe(choices: tuple[Any, ...]) -> str:
    """The choices as one would type them."""
    return ", ".join(
        "None" if c is None else f"{c.__name__}(...)" if isinstance(c, type) else c.__name__ for c in choices
    )


def literal(value: Any) -> str:
    """``value``, a part or a plain value, as an option takes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = (f"{field.name}={literal(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{_name(value)}({', '.join(inside)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' * (len(value) == 1)})"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else _name(value)


def as_options(config: TrainConfig) -> list[str]:
    """``config`` as options that give it whatever the preset: one for each field, the objective's each by itself.

    The objective's kind goes before its fields, and both before what is refused with another kind.
    """
    whole = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    parts, of_its_kind = whole.pop("objective"), {name: whole.pop(name) for name in ("preconditioning", "second_sigma")}
    whole["objective"] = type(parts)
    whole |= {f"objective.{field.name}": getattr(parts, field.name) for field in dataclasses.fields(parts)}
    return [f"{path}={literal(value)}" for path, value in (whole | of_its_kind).items()]


def to_json(value: Any) -> Any:
    """A configuration as JSON: parts become ``{"part": name, field: ...}``, functions their name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"part": _name(type(value)), **fields}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"part": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"part": _name(value)}


def filled(data: Any) -> Any:
    """``to_json`` of an earlier version with the fields that have come since at their defaults."""
    if isinstance(data, list):
        return [filled(item) for item in data]
    if not isinstance(data, dict):
        return data
    given = {key: filled(value) for key, value in data.items()}
    part = _part_named(data.get("part"))
    fields = dataclasses.fields(part) if _is_part(part) else ()
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return {name: to_json(value) for name, value in defaults.items()} | given


def strange_fields(data: Any) -> Iterator[str]:
    """``Part.field`` for each field in ``to_json`` of another version that its part does not have in this one."""
    if isinstance(data, dict):
        part = _part_named(data.get("part"))
        names = {"part", *(field.name for field in dataclasses.fields(part))} if _is_part(part) else data.keys()
        yield from (f"{_name(part)}.{key}" for key in data if key not in names)
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from strange_fields(item)


def from_json(data: Any) -> TrainConfig:
    """The inverse of ``to_json`` for configurations made of known parts.

    Raises:
        UserError: no configuration, a part that only Python knew, a field this version does not have, or a value that
            does not fit its field.
    """
    try:
        config = _part_from_json(data)
    except RecursionError:
        config = None
    if not isinstance(config, TrainConfig):
        raise UserError(f"no configuration of a run: {_shown(data)}")
    return config


def _part_from_json(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_part_from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    name = data.get("part")
    part = _part_named(name)
    if part is None:
        raise UserError(
            f"the configuration names {_shown(name)}, which is no part of this version: if the part is yours, call "
            "reference_trainer.choices.offer(part, ...) first, as your trainer did; else use the version that made it"
        )
    given = {key: _part_from_json(item) for key, item in data.items() if key != "part"}
    return _build(part, given) if _is_part(part) else part


def _part_named(name: Any) -> Any:
    return TrainConfig if name == "TrainConfig" else VOCABULARY.get(str(name))


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """``path: old -> new`` for every leaf in which two ``to_json`` trees differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("part") == new.get("part"):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    return _shown(value["part"] if isinstance(value, dict) and "part" in value else value)


def _shown(value: Any) -> str:
    """``value`` in an error message: on one line, and not a long one."""
    try:
        text = " ".join((value if isinstance(value, str) else repr(value)).split())
    except (ValueError, RecursionError):  # an int of thousands of digits, lists in lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"


def _name(part: Any) -> str:
    name = str(getattr(part, "__name__", ""))
    if part is TrainConfig or VOCABULARY.get(name) is part:
        return name
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _name(type(part))
    return f"{getattr(part, '__module__', '?')}:{getattr(part, '__qualname__', repr(part))}"
