"""The package: sdist and wheel hold what they should, and the wheel alone trains a model, far from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser as Headers
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

import reference_trainer.__main__ as trainer
from reference_trainer.__main__ import main
from reference_trainer.command import INSTALLED, MODULE
from reference_trainer.commands import train
from robustcm import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("robustcm", "reference_trainer", "analysis")
NO_NETWORK = ("--no-index", "--no-deps", "--disable-pip-version-check", "--quiet")
TINY = ["pixels", "steps=2", "batch_size=8", "objective.gate=Above(1)", "--device=cpu", "--brief"]
TINY += ["network=DiT(width=8,layers=1,heads=2,patch=16)", "data.resolution=16"]


def called(*command: str, cwd: Path, **environment: str) -> str:
    """What a command printed; its complaint if it failed."""
    ran = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy of the tree: building leaves files behind."""
    tree, out = tmp_path_factory.mktemp("tree") / "robustcm", tmp_path_factory.mktemp("sdist")
    left_behind = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, tree, ignore=left_behind)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    called(sys.executable, "-c", build, str(out), cwd=tree)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built of the sdist: nothing that it needs is left out there."""
    out = sdist.parent / "wheel"
    called(
        *(sys.executable, "-m", "pip", "wheel", *NO_NETWORK, "--no-build-isolation"),
        *("--wheel-dir", str(out), str(sdist)),
        cwd=sdist.parent,
    )
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder where the wheel, and nothing else, is installed."""
    target = wheel.parent / "site"
    called(sys.executable, "-m", "pip", "install", *NO_NETWORK, "--target", str(target), str(wheel), cwd=wheel.parent)
    return target


def names_in(archive: Path) -> set[str]:
    """Files of a wheel, or of a sdist without its one folder."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as opened:
        return {entry.name.partition("/")[2] for entry in opened if entry.isfile()}


def of_the_tree() -> set[str]:
    """What both archives must have: every module and everything that is read beside one."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file())
    return {name for file in files if "__pycache__" not in (name := file.relative_to(ROOT).as_posix())}


def test_sdist_and_wheel_hold_all_of_the_packages_and_the_licence(sdist: Path, wheel: Path):
    wanted = of_the_tree()
    assert {"robustcm/py.typed", "reference_trainer/py.typed", "analysis/td_outliers.py"} <= wanted
    assert "reference_trainer/evaluation/digit_classifier.safetensors" in wanted
    assert wanted - names_in(wheel) == set()
    assert wanted - names_in(sdist) == set()
    assert {"LICENSE", "README.md", "pyproject.toml", "CHANGELOG.md", "CITATION.cff"} <= names_in(sdist)
    assert any(name.endswith("licenses/LICENSE") for name in names_in(wheel))


def test_they_hold_nothing_else(sdist: Path, wheel: Path):
    info = f"robustcm-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names_in(wheel)} == {*PACKAGES, info}
    folders = {name.partition("/")[0] for name in names_in(sdist) if "/" in name}
    assert folders == {*PACKAGES, "robustcm.egg-info"}
    for archive in (sdist, wheel):
        assert archive.stat().st_size < 2**21


def test_the_metadata_say_what_the_code_is(wheel: Path):
    (file,) = (name for name in names_in(wheel) if name.endswith(".dist-info/METADATA"))
    metadata = Headers().parsestr(zipfile.ZipFile(wheel).read(file).decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_the_wheel_alone_trains_and_leaves_a_run(installed: Path, kept_images: Path, tmp_path: Path):
    environment = {"PYTHONPATH": str(installed), "ROBUSTCM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    # One process for all: the imports take longest.
    script = """
import runpy, sys
import reference_trainer, robustcm
for words in sys.argv[1].split("|"):
    sys.argv = ["python -m", *words.split()]
    try:
        runpy.run_module("reference_trainer", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (words, end.code)
from reference_trainer.evaluation.digit_classifier import load_digit_classifier
load_digit_classifier()
print(reference_trainer.__file__, robustcm.__file__)
"""
    words = "|".join(["--version", "--help", " ".join([*TINY, f"--data={kept_images}", "--out", "run"])])
    printed = called(sys.executable, "-c", script, words, cwd=tmp_path, **environment)
    assert printed.startswith(f"robustcm {__version__}\nusage: python -m reference_trainer ")
    assert "1 evaluation" in printed
    assert all(str(installed) in file for file in printed.splitlines()[-1].split())
    assert {"config.json", "evaluation.json", "metrics.jsonl"} <= {file.name for file in (tmp_path / "run").iterdir()}


def test_the_command_is_installed_and_its_help_says_its_name(installed: Path, tmp_path: Path):
    command, path = installed / "bin" / "robustcm", {"PYTHONPATH": str(installed)}
    assert called(str(command), "--version", cwd=tmp_path, **path) == f"robustcm {__version__}\n"
    shown = called(str(command), "train", "--help", cwd=tmp_path, **path)
    assert shown.startswith("usage: robustcm train ")
    assert "robustcm ilct steps=1000 --out runs/brief" in shown
    assert MODULE not in shown


def test_help_names_the_module_where_that_was_called(monkeypatch: pytest.MonkeyPatch, capsys):
    for called_as, name in (("reference_trainer/__main__.py", MODULE), ("/usr/bin/robustcm", INSTALLED)):
        monkeypatch.setattr(sys, "argv", [called_as])
        with pytest.raises(SystemExit):
            main(["ablate", "--help"])
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: {name} ablate")
        assert f"{name} ablate --list" in shown


def test_the_core_alone_says_what_the_trainer_needs(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "reference_trainer.config", None)
    assert main(["--show"]) == 1  # a fault: no module of an extra is missing
    assert "unexpected ModuleNotFoundError" in capsys.readouterr().err

    def without_tqdm(_: object) -> int:
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm.auto")

    monkeypatch.setattr(train, "run_train", without_tqdm)
    assert main(["--show"]) == 2
    assert capsys.readouterr().err == (
        "error: the trainer needs tqdm.auto: the extra trainer brings it, in a clone pip install -e '.[trainer]'\n"
    )


def test_a_python_that_nothing_was_installed_into_says_which_one_to_call(monkeypatch: pytest.MonkeyPatch, capsys):
    def without_torch(_: object) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(train, "run_train", without_torch)
    assert main(["--show"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sys.executable} has no torch: in a clone call .venv/bin/python")
    named = {"pot": "ot"}
    assert {named.get(name, name) for name in names(PROJECT["dependencies"])} == set(trainer.OF_THE_CORE)


def names(requirements: list[str]) -> set[str]:
    """Without versions."""
    return {line.partition(">")[0] for line in requirements}


def test_that_extra_is_what_the_command_knows_it_as():
    named = {"pillow": "PIL"}
    wanted = names(PROJECT["optional-dependencies"]["trainer"])
    assert {named.get(name, name) for name in wanted} == set(trainer.OF_THE_EXTRA)
    assert all(find_spec(name) for name in trainer.OF_THE_EXTRA)


def test_the_versions_of_python_are_said_alike():
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert f">={classifiers[0]}" == PROJECT["requires-python"]
    assert (ROOT / "noxfile.py").read_text().count(f'"{classifiers[-1]}"') >= 1


def test_the_command_is_the_module_s_main():
    assert PROJECT["scripts"] == {"robustcm": "reference_trainer.__main__:main"}
    for found in entry_points(group="console_scripts", name="robustcm"):  # none in an older editable install
        assert found.load() is main
