"""What the analysis concludes from box plots, and the figure that shows them."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_tails import synthetic

from analysis import drawing, td_outliers
from reference_trainer.evaluation import boxes
from robustcm.tails import box_statistics
from robustcm.tails.advice import advise


def test_the_last_line_concludes_from_both_values_and_residuals():
    rng = np.random.default_rng(0)

    def box(x):
        return box_statistics(x).as_dict()

    def advised(law, where, d=64):
        td, level = synthetic(law, where, 2000, d, rng)
        return advise(np.linalg.norm(td, axis=1), level, 21, d, td)

    light, heavy = box(rng.standard_normal(10_000)), box(rng.standard_t(2, 10_000))
    gaussian, whole = advised("Gaussian", "whole"), advised("Student t 2", "whole")
    elements = advised("5 % x10", "elements", d=1024)
    assert td_outliers.in_short(heavy, gaussian).startswith(
        "data values: heavy tails, which clip= of the trainer is for"
    )
    assert "a robust distance should not help" in td_outliers.in_short(heavy, gaussian)
    assert td_outliers.in_short(light, whole).startswith("data values: light tails; temporal")
    assert "a robust distance should help" in td_outliers.in_short(light, whole)
    assert "so a distance per sample should not help, PerElement might" in td_outliers.in_short(light, elements)
    assert "only temporal differences tell" in td_outliers.in_short(light, None)


def test_the_gaussian_beside_has_the_same_size_box_and_no_tail():
    x = np.random.default_rng(0).standard_t(2, 50_000).astype(np.float32)
    box = box_statistics(x)
    gaussian = box_statistics(drawing.gaussian_beside(x, box))
    assert gaussian.count == box.count
    assert gaussian.iqr == pytest.approx(box.iqr, rel=0.03)
    assert gaussian.beyond_inner == pytest.approx(0.007, abs=0.002)


def test_outliers_drawn_are_outliers_the_farthest_among_them():
    x = np.random.default_rng(0).standard_t(2, 200_000).astype(np.float32)
    box = box_statistics(x)
    shown = boxes.outliers_of(x, box)
    assert 100 < len(shown) <= boxes.MOST_POINTS
    assert ((shown < box.inner_fences[0]) | (shown > box.inner_fences[1])).all()
    assert np.abs(x).max() in np.abs(shown)
    assert (
        len(boxes.outliers_of(x[:100], box))
        == ((x[:100] < box.inner_fences[0]) | (x[:100] > box.inner_fences[1])).sum()
    )


def column(label, x):
    box = box_statistics(x)
    return boxes.Column(label, box, boxes.outliers_of(x, box))


def test_the_figure_shows_each_box_its_fences_and_shares():
    rng = np.random.default_rng(0)
    x, levels = rng.standard_t(3, 5000), [(s, box_statistics(rng.standard_t(3, 500))) for s in (0.1, 1.0, 10.0)]
    figure = drawing.draw_outliers(
        [column("pixels", x)], [column("pixels", x), column("latents", 3 * x)], {"pixels": levels}
    )
    figure.canvas.draw()
    data, td, by_level = figure.axes
    label = td.get_xticklabels()[1].get_text()
    assert label.startswith("latents")
    assert f"max|z| {box_statistics(x).max_z:.1f}" in label
    low, high = td.get_ylim()
    assert low < 3 * x.min() < 3 * x.max() < high  # nothing is cut off
    assert {
        round(y, 6) for c in data.collections if hasattr(c, "get_segments") for s in c.get_segments() for y in s[:, 1]
    } == {round(f, 6) for f in (*box_statistics(x).inner_fences, *box_statistics(x).outer_fences)}
    np.testing.assert_allclose(by_level.lines[0].get_ydata(), [b.beyond_inner for _, b in levels])


def test_a_degenerate_box_is_said_in_the_figure():
    x = np.zeros(1000)
    x[:100] = np.arange(100)
    figure = drawing.draw_outliers([column("pixels", x)], [], {})
    assert "IQR = 0" in figure.axes[0].get_xticklabels()[0].get_text()


def test_tails_are_called_light_slightly_heavier_or_heavy():
    rng = np.random.default_rng(0)

    def called(x):
        return td_outliers.heaviness(box_statistics(x).as_dict()).split(" ")[0:2]

    assert called(rng.standard_normal(100_000)) == ["light", "tails:"]
    assert called(rng.uniform(size=100_000)) == ["light", "tails:"]
    assert called(rng.standard_t(12, 100_000)) == ["tails", "slightly"]
    assert called(rng.standard_t(3, 100_000)) == ["heavy", "tails:"]
