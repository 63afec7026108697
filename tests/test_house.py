"""What surrounds the code is true of it: contributing, changelog, citation, security, matrix and Makefile."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from robustcm import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str):
    found = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", TEXTS[name])
    assert [link for link in found if not (ROOT / link).exists()] == []


def test_every_command_that_is_told_to_a_contributor_exists():
    text = TEXTS["CONTRIBUTING.md"]
    targets = set(re.findall(r"\bmake (\w+)", text))
    assert {"install", "test", "gallery", "package", "matrix"} <= targets
    assert [target for target in targets if f"\n{target}: " not in MAKEFILE] == []
    files = re.findall(r"\b(?:tests|benchmarks)/\w+\.py", text)
    assert len(files) >= 2
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_three_commands_come_first():
    first = re.search(r"^```\n(.*?)^```$", TEXTS["CONTRIBUTING.md"], re.DOTALL | re.MULTILINE)
    assert [line.partition(" ")[0] for line in first[1].splitlines()] == ["make", ".venv/bin/python", "make"]


def test_the_map_names_every_folder_with_code():
    on_the_map = set(re.findall(r"^\| \[(\w+)\]", TEXTS["CONTRIBUTING.md"], re.MULTILINE))
    there = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("[!.]*/*") if file.suffix in (".py", ".md")}
    assert on_the_map == {folder for folder in there if folder not in ("runs", "build", "dist")}


def test_every_target_is_phony():
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE)) == set(phony.split())


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {PROJECT["version"], citation["version"], __version__} == {__version__}
    assert f"robustcm-{__version__}-py3" in (ROOT / "README.md").read_text()


def test_the_citation_has_what_the_format_asks_for_and_the_paper_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Dao", "Doan", "Liu", "Le", "Metaxas"]
    assert paper["url"] in (ROOT / "README.md").read_text()
    assert paper["url"] == PROJECT["urls"]["Paper"]


def test_the_changelog_s_newest_part_is_of_what_is_not_released():
    parts = re.findall(r"^## (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert parts[0] == "Unreleased"
    kinds = re.findall(r"^### (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_extra_stands_in_the_readme():
    install = (ROOT / "README.md").read_text().partition("## Install")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", install, re.MULTILINE)) == set(PROJECT["optional-dependencies"])


def test_nothing_is_unpickled_as_security_promises():
    lines = [
        (file.name, line)
        for package in ("robustcm", "reference_trainer", "analysis")
        for file in (ROOT / package).rglob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r"\btorch\.load\(|\bpickle\.|import pickle|allow_pickle|\beval\(|\bexec\(", line)
        and not re.search(r"\.eval\(\)", line)
    ]
    assert [name for name, line in lines if "weights_only=True" not in line] == []
    assert {name for name, _ in lines} == {"fidelity.py"}


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of noxfile.py; of nox itself it needs three here."""
    nox = ModuleType("nox")
    nox.options = type("Options", (), {})()
    nox.session = nox.parametrize = lambda *_, **__: lambda function: function
    nox.Session = object
    monkeypatch.setitem(__import__("sys").modules, "nox", nox)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "noxfile"}
    exec(compile((ROOT / "noxfile.py").read_text(), "noxfile.py", "exec"), names)
    return names


def test_the_matrix_runs_each_python_that_the_package_claims(matrix: dict[str, Any]):
    claimed = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert list(matrix["PYTHONS"]) == claimed


def test_its_oldest_are_the_lower_bounds(matrix: dict[str, Any]):
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    bounded = {line.replace(">=", "==") + ".*" for group in groups for line in group if ">=" in line}
    assert "torch==2.5.*" in bounded
    assert set(matrix["oldest"]("3.11")) == bounded
    assert "torch==2.10.*" in matrix["oldest"]("3.14")
