"""What every field of a configuration does, as `train --fields` prints it: read from the strings under the fields."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from typing import Any

from reference_trainer.config import TrainConfig
from reference_trainer.options import choices_of, describe, field_of, literal, typed

WIDTH = 110


def describe_fields(config: TrainConfig, path: str = "") -> str:
    """Every field below ``path`` (all of ``config`` if empty): its value, what it does, what it takes.

    Where a part can be exchanged, also the fields of what could stand there.

    Raises:
        UserError: no such path.
    """
    if not path:
        return "\n".join(_fields_of(config, ""))
    *above, name = path.split(".")
    owner: Any = config
    for step in above:
        owner = field_of(owner, step, path)
    return "\n".join(_field(type(owner), name, field_of(owner, name, path), path))


def docs_of(part: type) -> dict[str, str]:
    """The string under each field of a dataclass, on one line; those it inherits included."""
    found = {}
    for owner in reversed(part.__mro__):
        if not is_dataclass(owner):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        names = {field.name for field in fields(owner)}  # a ClassVar is none
        for statement, below in pairwise(definition.body):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))) if (
                    name in names
                ):
                    found[name] = " ".join(text.replace("``", "`").split())
    return found


def _fields_of(part: Any, path: str) -> Iterator[str]:
    """Of an instance of a part its fields; of a class with their defaults."""
    owner = part if isinstance(part, type) else type(part)
    for field in fields(owner):
        value = _default(field) if part is owner else getattr(part, field.name)
        yield from _field(owner, field.name, value, f"{path}{field.name}")


def _field(owner: type, name: str, value: Any, path: str) -> Iterator[str]:
    choices = choices_of(owner, name)
    kind = describe(choices) if choices else typed(typing.get_type_hints(owner)[name])
    inside = is_dataclass(value) and fields(value)
    shown = "needed" if value is MISSING else f"{type(value).__name__}(...)" if inside else literal(value)
    yield f"{path}={shown}"
    yield _paragraph(f"{docs_of(owner).get(name, '')} [{kind}]", 4)
    if inside:
        yield from _fields_of(value, path + ".")
    for choice in choices or ():
        if choice is not None and choice is not value and choice is not type(value):
            is_part = isinstance(choice, type)
            yield _paragraph(f"{path}={choice.__name__}{'(...)' * is_part}: {_first_line(choice)}", 4)
            if is_part:
                yield from (textwrap.indent(line, "    ") for line in _fields_of(choice, path + "."))


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _first_line(part: Any) -> str:
    return (inspect.getdoc(part) or "").partition("\n")[0].replace("``", "`")


def _paragraph(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
