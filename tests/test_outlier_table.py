"""Several sets in one table: shares, kurtosis and the furthest value are those of the tails, the premise follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis import outlier_table
from analysis.td_outliers import described
from robustcm.tails import box_statistics, box_statistics_by

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence"


def measured(folder: Path, values: np.ndarray, td: np.ndarray | None = None, level: np.ndarray | None = None) -> Path:
    """What td_outliers.py writes, as much as is read."""
    space = {"data": described(values, range(values.shape[1]))}
    if td is not None and level is not None:
        boxes = box_statistics_by(td, level).values()
        space |= {"td": {"by_level": [box.as_dict() for box in boxes]}, "advice": {"gain": 1.25}}
    folder.mkdir()
    (folder / "td_outliers.json").write_text(json.dumps({"latents": space}))
    return folder


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.usefixtures("drawn_pictures")
def test_a_row_says_what_the_tails_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    values = gaussian(500, 2, 4, 4)
    values[::10, 1, 0, 0] *= 30
    level = np.repeat([0, 1], 200)
    td = gaussian(400, 2, 4, 4, seed=1) * (1 + 99 * level[:, None, None, None])
    spoilt, clean = measured(tmp_path / "spoilt", values, td, level), measured(tmp_path / "clean", values[:, :1])
    assert outlier_table.main([str(spoilt), str(clean), "--out", str(tmp_path / "out")]) == 0
    box = box_statistics(values)
    furthest = max(box.max - box.q3, box.q1 - box.min) / box.iqr
    (row, other) = capsys.readouterr().out.splitlines()[2:4]
    name, count, inner, outer, kurtosis, channels, far, td_inner, td_outer, gain, premise = row.strip("| ").split(" | ")
    assert (name, int(count), gain, premise) == ("spoilt", values.size, "1.25", "values")
    assert inner == f"{box.beyond_inner:.2%}".replace("%", " %")
    assert outer == f"{box.beyond_outer:.2%}".replace("%", " %")
    assert (kurtosis, far) == (f"{box.kurtosis:.1f}", f"{furthest:.1f}")
    assert channels == " .. ".join(f"{box_statistics(values[:, i]).kurtosis:.1f}" for i in (0, 1))
    # Levels a hundredfold apart, each Gaussian: pooled, a fifth would lie beyond; level by level nothing does.
    assert float(td_inner.removesuffix(" %")) == pytest.approx(0.7, abs=0.15)
    assert float(td_outer.removesuffix(" %")) < 0.02
    assert other.endswith("| - | - | - | no |")
    assert outlier_table.main([str(tmp_path / "out" / "outlier_table.json"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.splitlines()[2:4] == [row, other]
    assert (tmp_path / "out" / "outlier_table.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("values", "td", "said"),
    [(2e-3, 0.0, "values"), (0.0, 2e-3, "TD"), (2e-3, 2e-3, "values and TD"), (1e-3, 1e-3, "no")],
)
def test_the_premise_holds_from_a_thousandth_on(values: float, td: float, said: str):
    assert outlier_table.premise({"beyond_outer": values, "td": {"beyond_outer": td}}) == said


def test_what_cannot_be_tabled_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert outlier_table.main([str(tmp_path)]) == 2
    assert "no td_outliers.json" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    same = [
        measured(tmp_path / "set", gaussian(30, 1, 2, 2)),
        measured(tmp_path / "other" / "set", gaussian(30, 1, 2, 2)),
    ]
    assert outlier_table.main([*map(str, same), "--out", str(tmp_path)]) == 2
    assert "two sets have one name" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", '{"latents": {"data": {}}}', '{"set": 3}'])
def test_a_file_that_is_no_table_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "td_outliers.json"
    file.write_text(content)
    assert outlier_table.main([str(file), "--out", str(tmp_path)]) == 2
    assert "is no table of this script: give folders of td_outliers.py" in capsys.readouterr().err


def test_the_evidence_says_what_its_json_says():
    sets = json.loads((EVIDENCE / "natural_outliers.json").read_text())
    said = (ROOT / "docs" / "evidence.md").read_text().splitlines()
    assert [line for line in outlier_table.table(sets) if line not in said] == []
