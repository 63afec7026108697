"""What the predictor's script says of tiny ablations: rank correlation and exact p-value, against scipy and by hand."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reference_trainer.ablation.comparison import ONE, Result
from reference_trainer.errors import UserError


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module("non_gaussian_predictor")


few = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=6)


@given(few)
def test_the_correlation_is_scipys_and_the_p_value_counts_all_orders(script: ModuleType, sets: list[tuple[int, int]]):
    x, y = zip(*sets, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(UserError, match="no correlation"):
            script.rank_correlation(x, y)
        return
    rho, p = script.rank_correlation(x, y)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    ranks = stats.rankdata(x) - (len(x) + 1) / 2
    products = [abs(ranks @ np.array(order)) for order in permutations(stats.rankdata(y))]
    seen = abs(ranks @ stats.rankdata(y))
    assert p == pytest.approx(np.mean([product >= seen - 1e-9 for product in products]))


def test_ten_sets_in_order_are_two_orders_of_all(script: ModuleType):
    rho, p = script.rank_correlation(range(10), range(10))
    assert rho == pytest.approx(1)
    assert p == pytest.approx(2 / math.factorial(10))
    assert script.rank_correlation(range(10), range(9, -1, -1)) == (pytest.approx(-1), pytest.approx(p))


@pytest.mark.parametrize("n", [2, 17])
def test_numbers_of_sets_it_cannot_count_are_refused(script: ModuleType, n: int):
    with pytest.raises(UserError, match=f"{n} sets"):
        script.rank_correlation(range(n), range(n))


def ablation(
    out: Path, measure: float, ratio: float, arms: tuple[str, str] = ("iLCT", "iLCT + gated coupling")
) -> Path:
    """A finished one of two seeds, whose coupling gains ``ratio``, and the measure of its set."""
    distances = {arms[0]: 4.0, arms[1]: 4.0 * ratio}
    runs = [
        Result(suite="clean", arm=arm, seed=seed, steps=1, seconds=1.0, rows={ONE: {"frechet": value * (1 + seed)}})
        for arm, value in distances.items()
        for seed in (0, 1)
    ]
    out.mkdir()
    (out / "ablation.json").write_text(json.dumps({"runs": [asdict(run) for run in runs]}))
    levels = [{"t": 0.7, "ratio": 1 - measure}, {"t": 1.6, "ratio": measure}]
    (out / "non_gaussian_clean_ilct-gated-coupling.json").write_text(
        json.dumps({"latents": {"gate": 1.6, "levels": levels}})
    )
    return out


def test_sets_are_joined_with_their_gains(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.import_module("_timing"), "RESULTS", tmp_path / "results")
    figures = [(0.98, 0.9), (0.70, 0.2), (0.90, 0.5), (0.80, 0.3)]
    outs = [str(ablation(tmp_path / f"set{i}", *of)) for i, of in enumerate(figures)]
    assert script.main(outs) == 0
    said = capsys.readouterr().out
    assert "rho 1.00, exact p 0.0833 (two-sided), sets: 4; fewer than 10 sets: no answer yet" in said
    assert [line.split()[:3] for line in said.splitlines() if "set" in line and "clean" in line] == [
        [f"{m:.3f}", f"{g:.2f}", "2"] for m, g in sorted(figures)
    ]
    (file,) = (tmp_path / "results").glob("non_gaussian_predictor_*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["pair"] == ["iLCT", "iLCT + gated coupling"]
    assert [point["log_gain"] for point in row["points"]] == pytest.approx([math.log(gain) for _, gain in figures])
    assert script.main([*outs, "--at", "0.7"]) == 0
    assert "rho -1.00" in capsys.readouterr().out


def test_what_is_missing_is_one_line(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert script.main([str(tmp_path)]) == 2
    assert "no ablation.json" in capsys.readouterr().err
    others = ablation(tmp_path / "others", 0.9, 0.5, ("iLCT", "paper"))
    assert script.main([str(others)]) == 2
    assert "none of these has both arms of a pair" in capsys.readouterr().err
    unmeasured = ablation(tmp_path / "unmeasured", 0.9, 0.5)
    (unmeasured / "non_gaussian_clean_ilct-gated-coupling.json").unlink()
    assert script.main([str(unmeasured)]) == 2
    assert "clean/ilct-gated-coupling/seed-0" in capsys.readouterr().err
