"""What numbers may be: the owner of a field, or of an argument, refuses what cannot work, in a line that says so.

Bounds are wide: they lie where float32 or the memory of a large machine ends, not where a value stops being sensible.
"""

from __future__ import annotations

import math
import operator
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

MOST = 2**31 - 1
"""Of whole numbers that count something, unless the owner says less."""
SMALLEST, LARGEST = 1e-6, 1e6
"""Of noise levels and what is compared with them: their squares are ordinary numbers in float32."""


def need_real(
    owner: object,
    *names: str,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    or_inf: bool = False,
) -> None:
    """Refuse the fields ``names`` of ``owner`` that are not finite numbers in the range given.

    Args:
        owner: a dataclass; the fields are looked up in it.
        above: exclusive, as ``below``; ``least`` and ``most`` are inclusive.
        or_inf: whether infinity will do, too.
    Raises:
        ValueError: names the field, what is allowed, and the value.
    """
    signs = {">": above, ">=": least, "<": below, "<=": most}
    bounds = {sign: bound for sign, bound in signs.items() if bound is not None}
    holds = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
    for name in names:
        value = getattr(owner, name)
        good = isinstance(value, Real) and not isinstance(value, bool)
        good = good and (_is_finite(value) or (or_inf and value == math.inf))
        if not (good and all(holds[sign](value, bound) for sign, bound in bounds.items())):
            allowed = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items())
            kind = f"a number {allowed}, or inf" if or_inf else f"a finite number {allowed}"
            raise ValueError(f"{name} must be {kind.strip()}, got {value!r}")


def need_whole(owner: object, *names: str, least: int, most: int = MOST) -> None:
    """Refuse the fields ``names`` of ``owner`` that are not whole numbers from ``least`` to ``most``.

    Raises:
        ValueError: names the field, what is allowed, and the value.
    """
    for name in names:
        if not _is_whole(value := getattr(owner, name), least, most):
            raise ValueError(f"{name} must be a whole number in {least} .. {most}, got {value!r}")


def need_wholes(owner: object, name: str, *, least: int, most: int, entries: int) -> None:
    """Refuse the field ``name`` of ``owner`` that is not a tuple of whole numbers, at most so many ``entries``.

    Raises:
        ValueError: names the field, what is allowed, and the value.
    """
    value = getattr(owner, name)
    good = isinstance(value, tuple) and 1 <= len(value) <= entries
    if not (good and all(_is_whole(entry, least, most) for entry in value)):
        raise ValueError(f"{name} must be 1 to {entries} whole numbers in {least} .. {most}, got {value!r}")


def need_order(owner: object, low: str, high: str, *, ratio: float = 1) -> None:
    """Refuse the field ``low`` of ``owner`` if it times ``ratio`` is above the field ``high``.

    Raises:
        ValueError: names both and their values.
    """
    small, large = getattr(owner, low), getattr(owner, high)
    if small * ratio > large:
        times = "" if ratio == 1 else f"{ratio:g} times "
        raise ValueError(f"{high} must be at least {times}{low}, got {low} = {small} and {high} = {large}")


def need_finite(**tensors: Tensor) -> None:
    """Refuse tensors ``[b, ...]`` with a NaN or an infinity, by sample. Waits for the device.

    Raises:
        ValueError: names the tensor and its samples.
    """
    for name, values in tensors.items():
        finite = values.detach().flatten(1).isfinite().all(1)
        if not finite.all():
            bad = torch.nonzero(~finite).flatten().tolist()
            shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise ValueError(f"{name} is NaN or infinite in sample {shown} of {len(values)}: mend or leave these out")


def need_seed(owner: object) -> None:
    """Refuse a field ``seed`` that torch does not take.

    Raises:
        ValueError: see ``need_whole``.
    """
    need_whole(owner, "seed", least=0, most=2**63 - 1)


def _is_finite(value: Any) -> bool:
    return abs(int(value)) <= sys.float_info.max if isinstance(value, Integral) else math.isfinite(value)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most
