"""The documentation as a site: built without a word of complaint, whole without a network, its code run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import torch

import robustcm
from reference_trainer import choices
from reference_trainer.model import build_network
from reference_trainer.options import from_json, to_json
from reference_trainer.presets import digits, trajectory
from reference_trainer.training import loop
from reference_trainer.training.batches import with_measured_parts
from reference_trainer.words import with_options
from robustcm import draw

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
PACKAGES = ("robustcm", "reference_trainer", "analysis")
CODE = r"^```python\n(.*?)^```$"
BLOCKS = [
    pytest.param(block, id=f"{name}: {n}")
    for name, text in PAGES.items()
    if name != "export.md"  # whose code asks for the folder that test_export_command.py exports
    for n, block in enumerate(re.findall(CODE, text, re.DOTALL | re.MULTILINE))
]


class Page(HTMLParser):
    """Anchors, links and what the browser loads by itself, of one page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects."""
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.add(given["href"])
        elif "src" in given:
            self.loaded.add(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    quiet = {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def dead(pages: dict[Path, Page]) -> list[tuple[str, str]]:
    """(page, link) of all links within the site that lead to no file or no anchor."""
    found = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = target.is_file() and (not url.fragment or unquote(url.fragment) in pages[target].anchors)
            if not there:
                found.append((path.name, link))
    return found


def test_every_link_and_anchor_leads_somewhere(pages: dict[Path, Page]):
    assert sum(len(page.links) for page in pages.values()) > 500
    assert dead(pages) == []


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path):
    here, there = (tmp_path / name for name in ("here.html", "there.html"))
    there.write_text('<h1 id="a">A</h1>')
    here.write_text('<a href="there.html#a"></a><a href="there.html#b"></a><a href="gone.html"></a><img src="no.png">')
    found = dead({path: Page(path.read_text()) for path in (here, there)})
    assert sorted(link for _, link in found) == ["gone.html", "no.png", "there.html#b"]


def test_every_document_is_a_page_and_in_the_navigation(pages: dict[Path, Page], site: Path):
    built = {path.relative_to(site).as_posix() for path in pages}
    assert {name.removesuffix(".md") + ".html" for name in PAGES} <= built
    home = pages[site / "index.html"].links
    assert {name.removesuffix(".md") + ".html" for name in PAGES if name != "index.md"} <= home


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page], site: Path):
    loaded = {link for page in pages.values() for link in page.loaded}
    assert any(link.endswith(".js") for link in loaded)
    assert [link for link in loaded if urlsplit(link).netloc] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*", styles) == []


@pytest.fixture
def parts_as_before() -> Iterator[None]:
    """What a page offers to the trainer is forgotten."""
    before = dict(choices.CHOICES), dict(choices.VOCABULARY)
    yield
    for table, was in zip((choices.CHOICES, choices.VOCABULARY), before, strict=True):
        table.clear()
        table.update(was)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("parts_as_before")
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    train = inspect.signature(loop.train)  # minutes of work: asked whether it takes what it is given
    monkeypatch.setattr(loop, "train", train.bind)
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # dataclasses look their module up
    exec(compile(block, "docs", "exec"), page.__dict__)


@pytest.mark.usefixtures("parts_as_before")
def test_the_parts_of_the_page_train_and_are_read_back(monkeypatch: pytest.MonkeyPatch):
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    block, _ = re.findall(CODE, PAGES["how-to/network.md"], re.DOTALL | re.MULTILINE)
    exec(compile(block, "docs", "exec"), page.__dict__)
    config = with_options(digits(), ["objective.distance=welsch", "network=MLP", "network.width=4"])
    assert from_json(to_json(config)) == config
    for recipe in (config, with_options(trajectory(config), ["objective.distance=welsch"])):
        x = 0.5 * torch.randn(8, 2, 4, 4)
        network, objective = build_network(recipe, (2, 4, 4)), with_measured_parts(recipe.objective, x)
        terms = objective(
            objective.function_of(network), objective.prepare(x, draw(0, 0, x.shape), 0, 10), objective.init()
        )
        terms.loss.backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())


KEY = re.compile(r"bibliography\.md#([a-z]+\d{4})\)")


def test_every_key_of_the_bibliography_is_cited_by_a_page_or_a_docstring():
    bibliography = PAGES["bibliography.md"]
    keys = set(re.findall(r"^### (\w+\d{4})$", bibliography, re.MULTILINE))
    assert len(keys) > 30
    cited = {key for text in PAGES.values() for key in KEY.findall(text)}
    assert cited <= {key.lower() for key in keys}
    sources = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    numbers = set(re.findall(r"\b\d{4}\.\d{5}\b", sources + (ROOT / "README.md").read_text()))
    entries = bibliography.split("\n### ")[1:]
    uncited = [
        entry.partition("\n")[0]
        for entry in entries
        if entry.partition("\n")[0].lower() not in cited
        and not numbers & set(re.findall(r"\d{4}\.\d{5}", entry))
        and not re.search(re.findall(r"[A-Z][a-z]+", entry)[0], sources)
    ]
    assert uncited == []
    assert numbers - set(re.findall(r"\d{4}\.\d{5}", bibliography)) == set()


def test_every_technique_links_paper_file_test_and_api():
    for name, text in PAGES.items():
        if name.startswith("techniques/"):
            rows = dict(re.findall(r"^\| (paper|file|test|API) \| (.+) \|$", text, re.MULTILINE))
            assert set(rows) == {"paper", "file", "test", "API"}, name
            assert "evidence.md" in text or "log.md" in text


def test_the_api_has_a_page_for_every_public_name():
    shown = set(re.findall(r"^::: (robustcm[\w.]+)", "\n".join(PAGES.values()), re.MULTILINE))
    modules = {f"robustcm.{module}" for module in set(robustcm._MODULE_OF.values())}
    assert modules - shown == set()
