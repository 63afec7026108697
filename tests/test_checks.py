"""What is refused, and in which words."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from robustcm.checks import MOST, need_order, need_real, need_seed, need_whole, need_wholes


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25), np.int64(1)])
def test_a_number_within_its_bounds_passes(value):
    need_real(SimpleNamespace(x=value), "x", least=0, most=1)
    need_real(SimpleNamespace(x=value), "x", above=-1, below=2)


@pytest.mark.parametrize("value", [-1e-9, 1.5, math.nan, math.inf, -math.inf, 10**400, True, None, "0.5", 1j])
def test_any_other_is_refused_with_its_name_and_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"^x must be a finite number >= 0 and <= 1, got ") as caught:
        need_real(SimpleNamespace(y=0.5, x=value), "y", "x", least=0, most=1)
    assert str(caught.value).endswith(repr(value))


def test_bounds_are_exclusive_where_they_say_so_and_infinity_passes_on_request():
    for value, bounds in ((0, {"above": 0}), (1, {"below": 1})):
        with pytest.raises(ValueError, match="x must be"):
            need_real(SimpleNamespace(x=value), "x", **bounds)
    need_real(SimpleNamespace(x=math.inf), "x", above=0, or_inf=True)
    for value in (-math.inf, math.nan):
        with pytest.raises(ValueError, match=r"x must be a number > 0, or inf, got -?(inf|nan)"):
            need_real(SimpleNamespace(x=value), "x", above=0, or_inf=True)


@pytest.mark.parametrize("value", [0, -1, MOST + 1, 10**400, 2.0, math.nan, True, "3", None])
def test_what_is_no_whole_number_of_the_range_is_refused(value):
    need_whole(SimpleNamespace(n=1, m=np.int64(MOST)), "n", "m", least=1)
    with pytest.raises(ValueError, match=r"^n must be a whole number in 1 \.\. 2147483647, got "):
        need_whole(SimpleNamespace(n=value), "n", least=1)


@pytest.mark.parametrize("value", [(), (1, 0), (1, 9), (1.0,), [1], 3, (1, 1, 1, 1)])
def test_so_is_what_is_no_tuple_of_them(value):
    need_wholes(SimpleNamespace(n=(1, 8, 3)), "n", least=1, most=8, entries=3)
    with pytest.raises(ValueError, match=r"^n must be 1 to 3 whole numbers in 1 \.\. 8, got "):
        need_wholes(SimpleNamespace(n=value), "n", least=1, most=8, entries=3)


def test_an_order_names_both_fields():
    need_order(SimpleNamespace(low=1.0, high=2.0), "low", "high", ratio=2)
    with pytest.raises(ValueError, match="high must be at least 3 times low, got low = 1 and high = 2"):
        need_order(SimpleNamespace(low=1, high=2), "low", "high", ratio=3)
    need_order(SimpleNamespace(low=2, high=2), "low", "high")
    with pytest.raises(ValueError, match="high must be at least low, got low = 3 and high = 2"):
        need_order(SimpleNamespace(low=3, high=2), "low", "high")


def test_a_seed_is_what_torch_takes():
    need_seed(SimpleNamespace(seed=2**63 - 1))
    for seed in (-1, 2**63, 0.5):
        with pytest.raises(ValueError, match="seed must be"):
            need_seed(SimpleNamespace(seed=seed))
