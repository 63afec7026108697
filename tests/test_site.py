"""The documentation as a site: built without a word of complaint, whole without a network, its code run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
BLOCKS = [
    pytest.param(block, id=f"{name}: {n}")
    for name, text in PAGES.items()
    for n, block in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
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


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), {"__name__": "page"})
