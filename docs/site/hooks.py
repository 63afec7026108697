"""mkdocs hook: what a document links to outside docs becomes a page of the site, and anchors are those of GitHub."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")
CODE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".cff": "yaml", ".json": "json", ".toml": "toml"}
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def origin(uri: str) -> str:
    """Where the page ``uri`` of the site lies in the repository."""
    return uri.removeprefix("source/") if uri.startswith("source/") else f"docs/{uri}"


def place(path: str) -> str:
    """Where the site has the file or folder ``path`` of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def target(uri: str, link: str) -> str:
    """What ``link`` on the page ``uri`` leads to, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin(uri)), link))


def links(markdown: str, uri: str) -> Iterator[str]:
    """Targets of the page within the repository."""
    for prose in CODE.split(markdown)[::2]:
        yield from (target(uri, link) for _, link in LINK.findall(prose))


def page_of(path: str) -> str:
    """A file or folder outside docs as Markdown."""
    file = ROOT / path
    if file.suffix == ".md":
        return NOT_SEARCHED + file.read_text()
    if file.is_dir():
        lines = [f"- `{f.name}`: {first_line(f)}" for f in sorted(file.glob("*.py"))]
        return f"{NOT_SEARCHED}# {path}\n\n" + "\n".join(lines) + "\n"
    return f"{NOT_SEARCHED}# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}\n````\n"


def first_line(file: Path) -> str:
    """What a module says it is."""
    return file.read_text().partition("\n")[0].strip('"')


def on_config(config: MkDocsConfig) -> None:
    """Headings get the anchors that GitHub gives them, so that one link serves both."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": slugify(case="lower")}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds a page for each file outside docs that a page links to, and for those that these link to."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        uri, markdown = waiting.pop()
        for path in links(markdown, uri):
            missing = not path.startswith(("docs/", "..")) and files.get_file_from_path(place(path)) is None
            if missing and (ROOT / path).exists():
                content = page_of(path)
                files.append(File.generated(config, place(path), content=content))
                if path.endswith(".md"):
                    waiting.append((place(path), content))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository, turned into links of the site."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri) or "."

    def moved(match: re.Match[str]) -> str:
        return match[1] + posixpath.relpath(place(target(uri, match[2])), here)

    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(CODE.split(markdown)))


class Docstrings(griffe.Extension):
    """Docstrings are written for the eye and for reStructuredText's ``::`` before code; Markdown has a plain colon."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Before the docstring is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
