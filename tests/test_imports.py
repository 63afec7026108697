"""Who may import whom: the core nothing above it, in the trainer only what lies on a lower floor, and no circles."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "robustcm").rglob("*.py"))
TRAINER = sorted((ROOT / "reference_trainer").rglob("*.py"))
MAY_BE_IMPORTED_BY_THE_CORE = {"robustcm", "torch", "numpy", "einops", "ot", "scipy", *sys.stdlib_module_names}
ABOVE_THE_TRAINER = {"analysis", "benchmarks", "tests", "conftest"}
FLOORS = (
    {"errors"},
    {"files"},
    {"command", "machine", "manual", "plotting", "networks", "ranks", "loading"},
    {"data", "computing", "optimizers", "pretrained"},
    {"sharding"},
    {"config"},
    {"published"},
    {"choices"},
    {"options", "presets"},
    {"words", "fields", "run"},
    {"averages"},
    {"model"},
    {"training", "evaluation", "matching"},
    {"ablation", "export"},
    {"commands"},
    {"__main__"},
)
"""Of the trainer, from the ground: a room may import itself and any room on a floor below."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, wherever in the file: ``from a import b`` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_walk():
    assert len(CORE) >= 10


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_imports_only_its_few_dependencies(path):
    assert tops(path) <= MAY_BE_IMPORTED_BY_THE_CORE


@pytest.mark.parametrize("path", TRAINER, ids=name)
def test_the_trainer_imports_nothing_above_it(path):
    assert not tops(path) & ABOVE_THE_TRAINER


def room_of(module: str) -> str:
    return module.split(".")[1]


def ways_up(module: str, imported: set[str]) -> set[str]:
    """Which of the modules ``imported`` by ``module`` do not lie below it."""
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    own = room_of(module)
    return {name for name in imported if room_of(name) != own and floor[room_of(name)] >= floor[own]}


def test_every_room_has_a_floor():
    inside = {module_of(path) for path in TRAINER} - {"reference_trainer"}
    assert {room_of(module) for module in inside} == set().union(*FLOORS)


@pytest.mark.parametrize("path", TRAINER, ids=name)
def test_imports_of_the_trainer_go_down_only(path):
    inside = {module_of(path) for path in TRAINER} - {"reference_trainer"}
    if module_of(path) in inside:
        assert ways_up(module_of(path), imports(path) & inside) == set()


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("reference_trainer.data.latents", "reference_trainer.config"),
        ("reference_trainer.training.loop", "reference_trainer.evaluation.evaluate"),
        ("reference_trainer.files", "reference_trainer.machine"),
        ("reference_trainer.model", "reference_trainer.ablation.ladder"),
    ],
)
def test_a_way_up_or_aside_is_seen(module, imported):
    assert ways_up(module, {imported, "reference_trainer.errors"}) == {imported}


@pytest.mark.parametrize("files", [CORE, TRAINER], ids=["robustcm", "reference_trainer"])
def test_no_import_goes_in_a_circle(files):
    modules = {module_of(path) for path in files}
    graph = {module_of(path): (imports(path) & modules) - {module_of(path)} for path in files}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError
