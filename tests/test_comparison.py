"""Arms beside each other: which distance ranks them, which are stopped, the table, the picture; scipy's intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reference_trainer.ablation.ablate import stopped_arms
from reference_trainer.ablation.comparison import (
    ONE,
    TWO,
    Result,
    as_markdown,
    draw_comparison,
    judged_by,
    paired_ratio,
    ranking,
)
from reference_trainer.ablation.ladder import BASELINE
from reference_trainer.plotting import save_figure


def result(arm: str, seed: int, one: float, two: float = 5.0, suite: str = "clean") -> Result:
    rows = {ONE: {"frechet": one, "precision": 0.5}, TWO: {"frechet": two}, "reconstructions": {"frechet": 1.0}}
    return Result(suite=suite, arm=arm, seed=seed, steps=10, seconds=1.0, rows=rows)


def test_the_rule_stops_an_arm_on_its_first_seed_alone_and_suite_by_suite():
    results = [result(BASELINE, 0, 10), result("bad", 0, 31), result("good", 0, 29), result("bad", 1, 5)]
    results += [result(BASELINE, 0, 100, suite="other"), result("bad", 0, 31, suite="other")]
    assert stopped_arms(results, 3.0) == [("clean", "bad")]
    assert stopped_arms(results, math.inf) == []
    assert stopped_arms(results[1:], 3.0) == []  # no baseline, no verdict


def with_rec(run: Result, one: float, two: float = 4.0) -> Result:
    """``run``, measured against the reconstructions, too."""
    more = {ONE: one, TWO: two}
    rows = {name: row | ({"frechet_rec": more[name]} if name in more else {}) for name, row in run.rows.items()}
    rows["bound: Gaussian latents decoded"] = {"frechet": 100.0, "frechet_rec": 90.0}
    return replace(run, rows=rows)


def test_arms_are_ranked_and_stopped_by_the_reconstructions_where_every_run_has_them():
    """Against the images the order is turned round by what the autoencoder loses, as it was on faces."""
    runs = [with_rec(result(BASELINE, 0, 800), 20), with_rec(result("near", 0, 830), 10)]
    runs.append(with_rec(result("far", 0, 820), 70))
    assert judged_by(runs, "clean") == "frechet_rec"
    assert ranking(runs, "clean", BASELINE) == [("near", 0.5), (BASELINE, 1.0), ("far", 3.5)]
    assert stopped_arms(runs, 3.0) == [("clean", "far")]
    older = [*runs, result("older", 0, 2500)]
    assert judged_by(older, "clean") == "frechet"
    assert [arm for arm, _ in ranking(older, "clean", BASELINE)] == [BASELINE, "far", "near", "older"]
    assert stopped_arms(older, 3.0) == [("clean", "older")]
    failed = replace(result("failed", 0, 1), rows={}, failure="NaN")
    assert ranking([*runs, failed], "clean", BASELINE) == ranking(runs, "clean", BASELINE)
    assert judged_by([failed], "clean") == judged_by([], "clean") == "frechet"


def test_the_table_shows_both_distances_and_says_which_one_ranks():
    runs = [with_rec(result(BASELINE, 0, 800), 20), with_rec(result("near", 0, 840), 10)]
    table = as_markdown(runs, BASELINE)
    assert "| near | 840.0 | 1.05 | 5.0 | 1.00 | 10.0 | 0.50 | 4.0 | 1.00 |" in table
    assert f"Ranked by FD rec at 1 evaluation, as ratios to the baseline: near 0.50; {BASELINE} 1.00." in table
    assert "FD of the bounds: reconstructions 1.0; bound: Gaussian latents decoded 100.0." in table
    assert "FD rec of the bounds: bound: Gaussian latents decoded 90.0." in table
    assert all(line.count("|") == table.splitlines()[2].count("|") for line in table.splitlines() if line[:1] == "|")


def test_runs_of_an_earlier_version_have_dashes_and_are_ranked_by_what_they_have():
    table = as_markdown([result(BASELINE, 0, 10), result("other", 0, 5)], BASELINE)
    assert "| other | 5.0 | 0.50 | 5.0 | 1.00 | - | - | - | - |" in table
    assert "Ranked by FD (not every run has FD rec) at 1 evaluation" in table
    assert "FD rec of" not in table


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=6))
def test_the_ratio_is_the_exponential_of_scipys_paired_t_interval(pairs: list[tuple[float, float]]):
    logs = np.log([a / b for a, b in pairs])
    found = paired_ratio(dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs)))
    assert found.mean == pytest.approx(stats.gmean([a / b for a, b in pairs]))
    if logs.std() > 1e-9:
        low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))


def test_only_common_seeds_are_paired():
    assert paired_ratio({0: 2.0, 5: 9.0}, {0: 1.0, 7: 1.0}) == paired_ratio({0: 2.0}, {0: 1.0})
    assert str(paired_ratio({0: 2.0}, {0: 1.0})) == "2.00"
    assert paired_ratio({1: 2.0}, {0: 1.0}) is None


def test_the_table_says_what_failed_what_stopped_and_what_bounds_the_figures():
    broken = replace(result("broken", 0, 1), rows={}, failure="the gradient became NaN")
    table = as_markdown([result(BASELINE, 0, 10), result("bad", 0, 40), broken], BASELINE, [("clean", "bad")])
    assert "| broken (seed 0 failed: the gradient became NaN) | - |" in table
    assert "| bad (further seeds skipped by the rule) | 40.0 | 4.00 |" in table
    assert "reconstructions 1.0" in table


@pytest.mark.usefixtures("drawn_pictures")
def test_the_picture_has_a_panel_a_suite_and_a_line_an_arm(tmp_path: Path):
    results = [result(arm, seed, 10 + seed, suite=s) for s in ("a", "b") for arm in ("x", "y") for seed in (0, 1)]
    figure = draw_comparison(results, "x")
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["x", "y"]
    assert save_figure(figure, tmp_path / "ablation.png").stat().st_size > 10_000


def test_the_picture_shows_the_distance_that_arms_are_ranked_by():
    plain = [result(arm, 0, 10) for arm in ("x", "y")]
    ranked = [replace(r, rows={ONE: {"frechet": 10.0, "frechet_rec": 3.0}}) for r in plain]
    for results, to, at in ((plain, "images", 10), (ranked, "reconstructions", 3)):
        (ax,) = draw_comparison(results, "x").axes
        assert ax.get_xlabel() == f"Frechet distance to the {to} (lower is better)"
        assert ax.lines[0].get_xdata() == pytest.approx([at])
