"""The figure of runs side by side: schedules of c as in training, metrics over training."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from analysis import c_schedules, drawing
from reference_trainer.errors import UserError
from reference_trainer.run import RunFolder
from robustcm.scales import ConstantC, MeasuredC, PowerLawC


def evaluation(step, frechet, features="pooled latents"):
    """A row of evaluations.jsonl."""
    rows = {f"{n} evaluation{'s' * (n > 1)}": {"n": 36, "frechet": frechet / n, "recall": 0.2 * n} for n in (1, 2)}
    return {"step": step, "seed": 0, "features": features, "rows": rows}


def test_evaluations_over_training_come_before_the_single_one_and_in_one_feature_space(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(30, 2.0)))
    assert c_schedules.evaluations_of(run) == [evaluation(30, 2.0)]
    rows = [evaluation(5, 99.0, "other features"), evaluation(10, 9.0), evaluation(20, 4.0)]
    for row in rows:
        run.append_row("evaluations.jsonl", row)
    assert c_schedules.evaluations_of(run) == rows[1:]
    for broken in ("{}", "not json", '{"rows": {}}'):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "evaluation.json").write_text(broken)
        assert c_schedules.evaluations_of(RunFolder(tmp_path / "broken")) == []


def curves(name, evaluations):
    spread = [(n, 1.0, 0.5) for n in c_schedules.STAGES]
    return drawing.RunCurves(name, spread, [(1, 1.0, 0.1), (2, 0.5, 0.1)], [(1, 2.0), (2, 1.0)], evaluations)


def test_logged_rows_that_are_not_finite_are_left_out_of_the_curve(tmp_path):
    def no_residuals(*_):
        raise UserError("too few images")

    run = RunFolder(tmp_path)
    for step, r in ((10, 1.0), (20, math.nan), (30, 0.5)):  # NaN is null in the file
        run.append_row("metrics.jsonl", {"step": step, "r": r, "c": 0.1, "consistency": 2.0})
    run.append_row("metrics.jsonl", {"step": 40})
    found, notes = c_schedules.curves_of(run, SimpleNamespace(residuals=no_residuals), "a", 20)
    assert found.logged == [(10, 1.0, 0.1), (30, 0.5, 0.1)]
    assert found.loss == [(10, 2.0), (30, 2.0)]
    assert notes == ["a: no residuals: too few images"]


def test_metrics_are_drawn_over_training_a_line_for_each_number_of_evaluations():
    runs = [
        curves("a", [evaluation(10, 9.0), evaluation(20, 4.0)]),
        curves("b", [evaluation(20, 6.0)]),
        curves("c", []),
    ]
    figure = drawing.draw_c_schedules({"ConstantC": [(11, 0.03), (641, 0.03)]}, runs)
    figure.canvas.draw()
    frechet, recall, both = figure.axes[3:]
    points = {line.get_label(): line.get_xydata().tolist() for line in frechet.lines}
    assert points == {
        "a, 1 evaluation": [[10, 9], [20, 4]],
        "a, 2 evaluations": [[10, 4.5], [20, 2]],
        "b, 1 evaluation": [[20, 6]],
        "b, 2 evaluations": [[20, 3]],
    }
    assert recall.lines[1].get_xydata().tolist() == [[10, 0.4], [20, 0.4]]
    assert both.lines[0].get_xydata().tolist() == [[0.2, 4]]
    empty = drawing.draw_c_schedules({"ConstantC": [(11, 0.03)]}, [curves("c", [])])
    assert [ax.texts[0].get_text() for ax in empty.axes[3:]] == ["no run was evaluated"] * 3


def test_one_logged_row_is_a_dot_and_none_a_word():
    def drawn(logged):
        run = drawing.RunCurves("a", [], logged, [(step, r) for step, r, _ in logged], [])
        figure = drawing.draw_c_schedules({"ConstantC": [(11, 0.03)]}, [run])
        figure.canvas.draw()
        return figure.axes[1:3]

    for ax in drawn([(7, 1.0, 0.1)]):
        assert {line.get_marker() for line in ax.lines} == {"o"}
    for ax in drawn([(7, 1.0, 0.1), (8, 0.5, 0.1)]):
        assert "o" not in {line.get_marker() for line in ax.lines}
    assert [ax.texts[0].get_text() for ax in drawn([])] == ["no run has logged anything"] * 2


def test_a_metric_an_evaluation_lacks_is_left_out_of_its_line():
    partial = evaluation(10, 9.0)
    del partial["rows"]["1 evaluation"]["recall"]
    figure = drawing.draw_c_schedules({"ConstantC": [(11, 0.03)]}, [curves("a", [partial])])
    assert [len(ax.lines) for ax in figure.axes[3:]] == [2, 1, 1]


def test_runs_in_different_features_are_said_not_to_compare():
    schedules = {"ConstantC": [(n, 0.03) for n in c_schedules.STAGES]}
    one, other = curves("a", [evaluation(10, 9.0)]), curves("b", [evaluation(10, 9.0, "other features")])
    assert "not comparable" in c_schedules.table(schedules, [one, other])[-1]
    assert not any("not comparable" in line for line in c_schedules.table(schedules, [one, one]))


def test_schedules_are_evaluated_as_in_training():
    assert c_schedules.c_at(ConstantC(), 11, 4096, 7.0) == pytest.approx(0.03456)
    assert c_schedules.c_at(PowerLawC(), 21, 4096, 7.0) == pytest.approx(np.exp(-1.15 * np.log(20) - 0.85))
    assert c_schedules.c_at(MeasuredC(multiple=0.5), 81, 9, 7.0) == pytest.approx(3.5, rel=0.02)
