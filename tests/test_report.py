"""report.html: one file that has all of a run, asks nothing of the network, and is not broken by a name."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reference_trainer.evaluation.report import write_page
from reference_trainer.evaluation.table import as_table
from reference_trainer.options import as_options, to_json
from reference_trainer.plotting import new_figure, save_figure
from reference_trainer.presets import digits, on_folder
from reference_trainer.run import EVALUATIONS, RunFolder

VOID = {"img", "meta", "link", "br", "hr", "input"}
ROW = {"n": 10, "frechet": 4.9321, "kernel_x1000": 5.12, "precision": 0.876, "recall": 0.824, "sure_digits": 0.907}
LATENT_ROW = {"n": 10, "whitened_frechet": 1.375, "kernel_x1000": 0.25, "precision": 0.5, "recall": 0.125}


class Page(HTMLParser):
    """What a browser sees: elements properly nested, their attributes, the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def evaluation(name: str = "three", features: str = "some features") -> dict[str, Any]:
    classes = [{"name": name, "images": 7, "samples": 5, "as_asked": {"1 evaluation": 0.8125}}]
    return {
        "step": 300,
        "features": features,
        "reference": f"10 training images of {name}",
        "rows": {"1 evaluation": ROW, "2 evaluations": ROW | {"frechet": 5.25}, f"floor: {name}": {"n": 10}},
        "latents": {"dimensions": 32, "components": 30, "rows": {"1 evaluation": LATENT_ROW}},
        "classes": {"guidance": 1.0, "rows": classes},
        "classifier_accuracy_held_out": 0.99,
        "left_out": {"floor": f"no {name}"},
        "notes": [f"of {name}, few"],
        "manifest": {"reference": {"name": name, "n": 10}, "code": "0.1.0 at abcdef", "device": "cpu"},
    }


def a_run(root: Path, data: str | None = None) -> RunFolder:
    run = RunFolder(root)
    root.mkdir(parents=True, exist_ok=True)
    config = digits() if data is None else on_folder(digits(), data)
    (root / "config.json").write_text(json.dumps(to_json(config)))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return a_run(tmp_path / "run")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return [save_figure(new_figure(1, 1, 1)[0], tmp_path / f"{name}.png") for name in ("samples", "losses", "mine")]


def page_of(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def test_the_pictures_are_in_the_page_to_the_last_byte_and_described(run: RunFolder, pictures: list[Path]):
    images = [dict(attrs) for tag, attrs in page_of(write_page(run, evaluation(), pictures)).elements if tag == "img"]
    heads, data = zip(*(image["src"].split(",") for image in images), strict=True)
    assert set(heads) == {"data:image/png;base64"}
    assert [base64.b64decode(each) for each in data] == [file.read_bytes() for file in pictures]
    assert all(image["alt"] for image in images)


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(run: RunFolder, pictures: list[Path]):
    page = page_of(write_page(run, evaluation(), pictures))
    asked = [value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert len(asked) == len(pictures)
    assert all(value.startswith("data:") for value in asked)
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags())
    assert "url(" not in (run.root / "report.html").read_text()
    (policy,) = (attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_it_is_of_a_telephone_s_width_and_of_the_system_s_colours(run: RunFolder):
    text = write_page(run, evaluation(), []).read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "color-scheme: light dark" in text
    wide = re.findall(r"<(?:table|img)\b", text)
    assert len(wide) == len(re.findall(r'<div class="wide[^"]*"><(?:table|img)\b', text))  # each scrolls by itself


def test_every_figure_of_the_terminal_s_table_is_in_the_page(run: RunFolder):
    said = evaluation()
    shown = page_of(write_page(run, said, [])).text
    figures = set(re.findall(r"\b\d+\.\d+\b", as_table({k: v for k, v in said.items() if k != "manifest"})))
    assert {"4.93", "5.25", "1.38", "0.812", "0.907"} <= figures
    assert [figure for figure in figures if figure not in shown] == []
    for line in ("left out: floor (no three)", "note: of three, few", "right on 99.0% of held-out digits"):
        assert line in shown


def test_configuration_and_manifest_are_in_the_page_whole(run: RunFolder):
    shown = page_of(write_page(run, evaluation(), [])).text
    assert [option for option in as_options(digits()) if option not in shown] == []
    for word in ("reference.name", "three", "0.1.0 at abcdef", "cpu"):
        assert word in shown


def test_a_run_that_was_looked_at_on_the_way_shows_each_time(run: RunFolder):
    assert "Over training" not in page_of(write_page(run, evaluation(), [])).text
    for step in (100, 300):
        run.append_row(EVALUATIONS, {"step": step, "rows": {"1 evaluation": {"frechet": step / 7}}})
    shown = page_of(write_page(run, evaluation(), [])).text
    assert "Over training" in shown
    assert "14.29" in shown
    assert "42.86" in shown


def test_an_evaluation_of_samples_alone_makes_a_page_without_the_rest(run: RunFolder):
    least = {"step": 3, "features": "f", "reference": "r", "rows": {}}
    shown = page_of(write_page(run, least, [])).text
    assert not [heading for heading in ("Latents", "Classes", "Measured with") if heading in shown]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=20) | st.just("</title><script>x()</script>"))
def test_no_name_is_markup(tmp_path: Path, name: str):
    run = a_run(tmp_path / "run", data=name)
    plain = page_of(write_page(run, evaluation("plain", "plain"), []))
    named = page_of(write_page(run, evaluation(name, name), []))
    assert named.elements == plain.elements


def test_the_folder_s_own_name_is_no_markup_either(tmp_path: Path):
    run = a_run(tmp_path / "<b>&amp;'\"$title")
    page = page_of(write_page(run, evaluation(), []))
    assert "b" not in page.tags()
    assert "<b>&amp;'\"$title" in page.text


def test_the_same_run_gives_the_same_bytes(run: RunFolder, pictures: list[Path]):
    first = write_page(run, evaluation(), pictures).read_bytes()
    assert write_page(run, evaluation(), pictures).read_bytes() == first
    changed = replace(digits(), seed=1)
    (run.root / "config.json").write_text(json.dumps(to_json(changed)))
    assert write_page(run, evaluation(), pictures).read_bytes() != first
