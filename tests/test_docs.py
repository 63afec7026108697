"""The documents hold: links, anchors and scripts exist, commands parse, and the evidence says what its JSON says."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from reference_trainer.__main__ import parser
from reference_trainer.ablation.ablate import base_of, picked
from reference_trainer.ablation.comparison import ONE, TWO, Result, by_seed, paired_ratio
from reference_trainer.ablation.ladder import ARMS, BASELINE, SUITES, arm_from_words
from reference_trainer.command import COMMANDS
from reference_trainer.commands.train import configuration
from reference_trainer.errors import UserError
from reference_trainer.words import with_options

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
LONG = ("README.md", "docs/guide.md", "docs/evidence.md", "docs/log.md")
TODAY = [name for name in DOCUMENTS if name != "docs/log.md"]  # the log's commands are those of their commits
EVIDENCE = DOCUMENTS["docs/evidence.md"]


def prose(text: str) -> str:
    """``text`` without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> list[str]:
    """Of every heading, as GitHub names them: lower case, punctuation gone, a hyphen a space, a number if repeated."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    repeats = [slugs[:i].count(slug) for i, slug in enumerate(slugs)]
    return [f"{slug}-{n}" if n else slug for slug, n in zip(slugs, repeats, strict=True)]


def links(text: str) -> list[str]:
    """Targets within the repository."""
    return re.findall(r"\]\((?!http)([^)]+)\)", prose(text))


def commands(text: str) -> list[str]:
    """Every line of the code blocks without a language or in bash; those that end in a backslash go on in the next."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    joined = [block.replace("\\\n", " ") for language, block in blocks if language in ("", "bash")]
    return [line for block in joined for line in block.splitlines() if line.strip()]


def test_anchors_are_those_of_github():
    text = "# Gates at d = 32\n## `a_b`, 5 % (c)\n```\n# no heading\n```\n## A\n## A\n"
    assert anchors(text) == ["gates-at-d--32", "a_b-5--c", "a", "a-1"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name: str):
    found = links(DOCUMENTS[name])
    assert len(found) > (10 if name in LONG else 0)
    dead = []
    for link in found:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    assert dead == []


def test_every_file_in_docs_is_linked_by_a_document():
    targets = [(ROOT / name).parent / link for name, text in DOCUMENTS.items() for link in links(text)]
    linked = {Path(str(target).partition("#")[0]).resolve() for target in targets}
    there = [path for path in ROOT.glob("docs/**/*") if path.is_file() and path.parent != ROOT / "docs" / "site"]
    assert len(there) > 40
    assert [path.name for path in there if path.resolve() not in linked] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_scripts_that_are_named_exist(name: str):
    scripts = re.findall(r"python\s+((?:analysis|benchmarks)/[\w/]+\.py)", DOCUMENTS[name])
    assert scripts or name not in LONG
    assert [script for script in scripts if not (ROOT / script).exists()] == []


class ParsedError(BaseException):
    """Raised instead of the work behind a command line that parses; no Exception, which a script would report."""


@contextlib.contextmanager
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, every command line is parsed and nothing more."""
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)

            def parse_and_stop(self: argparse.ArgumentParser, *given: Any, parse: Any = parse) -> None:
                parse(self, *given)
                raise ParsedError

            patch.setattr(argparse.ArgumentParser, name, parse_and_stop)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of latents that the documents call ``latents``."""
    root = tmp_path_factory.mktemp("latents")
    tensors = {"latents": torch.randn(20, 4, 2, 2), "labels": torch.zeros(20, dtype=torch.long)}
    save_file(tensors, root / "latents_rank00_shard000.safetensors")
    return root


def resolve_trainer(words: list[str], store: Path) -> None:
    """Parse, and look up what the trainer would look up before it starts."""
    if not words or words[0] not in COMMANDS:
        words = ["train", *words]
    options = parser().parse_args(words)
    if "data" in options and options.data == Path("latents"):
        options.data = store
    if words[0] == "train":
        configuration(options)
    if words[0] == "ablate":
        picked(options.arms, ARMS)
        picked(options.suites, SUITES)
        base, changes = base_of(options.words, options.data)
        with_options(base, changes)
        for arm in options.arm:
            arm_from_words(arm, options.data).build(base)


def without_starter(words: list[str]) -> list[str]:
    """What each process of torchrun's, or each task of srun's, is told."""
    if words[0] == "srun":
        return words[1 : words.index("||") if "||" in words else None]
    if words[0] != "torchrun":
        return words
    started = get_args_parser().parse_args(words[1:])
    return ["python", *(["-m"] if started.module else []), started.training_script, *started.training_script_args]


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=f"{n}: {c[:60]}") for n in TODAY for c in commands(DOCUMENTS[n])]
)
def test_command_lines_parse(command: str, store: Path, monkeypatch: pytest.MonkeyPatch):
    match without_starter(shlex.split(command, comments=True)):
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["python", "-m", "reference_trainer", *words]:
            resolve_trainer(words, store)
        case ["python", "-m", module]:
            assert find_spec(module) is not None
        case ["python", "-c", code]:
            compile(code, command, "exec")
        case ["python", "my_trainer.py", *_]:
            pass  # it stands above these lines, and test_site.py runs it
        case ["python", script, *words]:
            folder, _, name = script.removesuffix(".py").rpartition("/")
            monkeypatch.syspath_prepend(str(ROOT / folder))
            module = importlib.import_module(f"{folder}.{name}" if folder == "analysis" else name)
            monkeypatch.setattr(sys, "argv", [script, *words])
            with parsing_only(monkeypatch), pytest.raises(ParsedError):
                module.main()
        case words:
            pytest.fail(f"no command this test knows: {words}")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python benchmarks/coupling.py --epoch-count 3", SystemExit),
        ("python analysis/td_outliers.py --nothing", (SystemExit, pytest.fail.Exception)),
        ("python benchmarks/gone.py", ModuleNotFoundError),
        ("python -m reference_trainer steps=0", UserError),
        ("torchrun --nproc-per-node 8 -m reference_trainer steps=0", UserError),
        ("torchrun --processes 8 -m reference_trainer", SystemExit),
        ("torchrun --nproc-per-node 8 benchmarks/gone.py", ModuleNotFoundError),
        ("srun python -m reference_trainer steps=0 || { true; }", UserError),
        ("python -m reference_trainer ablate --arms nobody", UserError),
        ("python -m reference_trainer ablate --arm digits objective.gate=Nowhere", UserError),
        ("python -c 'print('", SyntaxError),
        ("make coffee", AssertionError),
        ("pip install everything", pytest.fail.Exception),
    ],
)
def test_command_lines_that_do_not_exist_are_found(
    command: str, error: Any, store: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(error), contextlib.redirect_stderr(io.StringIO()):
        test_command_lines_parse(command, store, monkeypatch)


def ablations() -> dict[str, tuple[list[str], list[Result]]]:
    """Of each JSON of the evidence that is an ablation's its command, split, and its runs."""
    found = {path.name: json.loads(path.read_text()) for path in (ROOT / "docs" / "evidence").glob("*.json")}
    found = {name: f for name, f in found.items() if "runs" in f}
    assert len(found) > 10
    return {name: (shlex.split(f["command"]), [Result(**run) for run in f["runs"]]) for name, f in found.items()}


def test_the_command_of_every_json_stands_in_the_evidence():
    there = [shlex.split(command) for command in commands(EVIDENCE)]
    assert [name for name, (command, _) in ablations().items() if command not in there] == []


def figures(runs: list[Result], arm: str, suite: str, row: str) -> dict[str, set[str]]:
    """What a table may say of an arm: distance (up to three decimals) with each seed's, ratio to the baseline."""
    found: dict[str, set[str]] = {"distance": set(), "ratio": set()}
    for metric in ("frechet", "kernel_x1000", "frechet_rec", "kernel_rec_x1000"):
        values = by_seed(runs, suite, arm, row, metric)
        if not values:  # of an earlier version, which did not measure it
            continue
        for decimals in (0, 1, 2, 3):
            each = ", ".join(f"{values[seed]:.{decimals}f}" for seed in sorted(values))
            found["distance"].add(f"{statistics.fmean(values.values()):.{decimals}f} ({each})")
        if metric.startswith("frechet"):
            found["ratio"].add(str(paired_ratio(values, by_seed(runs, suite, BASELINE, row, metric))))
    return found


def measured() -> dict[tuple[str, str, str], dict[str, dict[str, set[str]]]]:
    """(JSON, suite, arm) -> its figures at one evaluation and at two."""
    return {
        (name, suite, arm): {row: figures(runs, arm, suite, row) for row in (ONE, TWO)}
        for name, (_, runs) in ablations().items()
        for suite, arm in dict.fromkeys((run.suite, run.arm) for run in runs)
    }


def test_every_arm_of_every_json_stands_in_the_evidence():
    missing = [arm for arm, rows in measured().items() if not any(x in EVIDENCE for x in rows[ONE]["distance"])]
    assert missing == []


NUMBER = r"-?\d+(?:\.\d+)?"
DISTANCE, RATIO = rf"{NUMBER} \({NUMBER}(?:, {NUMBER})+\)", rf"{NUMBER} \({NUMBER} \.\. {NUMBER}\)"


def test_every_figure_with_its_seeds_comes_from_a_json():
    known = {x for rows in measured().values() for row in rows.values() for x in row["distance"]}
    said = re.findall(DISTANCE, prose(EVIDENCE))
    assert len(said) > 100
    assert [x for x in said if x not in known] == []


def test_distance_and_ratio_in_one_line_are_of_one_arm():
    arms = [[row["distance"] | row["ratio"] for row in rows.values()] for rows in measured().values()]
    lines = [
        line for line in EVIDENCE.splitlines() if line.startswith("|") and re.search(rf"{DISTANCE} .*{RATIO}", line)
    ]
    assert len(lines) > 15
    for line in lines:
        one, two = re.findall(rf"({DISTANCE}) \| ({RATIO})", line)
        assert any(set(one) <= at_one and set(two) <= at_two for at_one, at_two in arms), line


def what_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the evidence's one-line program about the JSON ``name`` prints."""
    (code,) = (
        words[2] for command in commands(EVIDENCE) if (words := shlex.split(command))[1] == "-c" and name in command
    )
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(printed := io.StringIO()):
        exec(compile(code, "docs/evidence.md", "exec"), {})
    return printed.getvalue()


ONE_OVER_ANOTHER = re.compile(rf"^\| `([^`]+)` \| `([^`]+)` \| (\d) \| ({RATIO}) \| ({RATIO}) \|$", re.MULTILINE)


def test_ratios_of_two_arms_are_those_of_a_json():
    files = [runs for _, runs in ablations().values()]
    there = set()
    for runs in files:
        for suite in {run.suite for run in runs}:
            arms = dict.fromkeys(run.arm for run in runs if run.suite == suite)
            for arm, over in permutations(arms, 2):
                one, two = (paired_ratio(*(by_seed(runs, suite, a, row) for a in (arm, over))) for row in (ONE, TWO))
                if one is not None:
                    there.add((arm, over, str(one.pairs), str(one), str(two)))
    said = ONE_OVER_ANOTHER.findall(EVIDENCE)
    assert len(said) > 10
    assert [row for row in said if row not in there] == []
    tables = re.findall(r"^\| arm[^|]*\| over[^|]*\| seeds.*\n.*\n((?:\|.*\n)+)", EVIDENCE, re.MULTILINE)
    assert sum(len(table.splitlines()) for table in tables) == len(said)  # no row is of another form


def test_recoupled_sampling_is_as_its_json_says():
    said = re.findall(r"^\| ((?:\w+, )?\d+) \| (\d evaluations?|2, .*?) \| (.+) \|$", EVIDENCE, re.MULTILINE)
    there = set()
    linked = [link for link in links(EVIDENCE) if "/results/recoupling_" in link]
    for path in ((ROOT / "docs" / link) for link in linked):  # beside them are those of whoever has measured since
        d = path.name.split("_")[1].replace("-d", ", ").removeprefix("d")
        runs = [row["frechet"] for row in json.loads(path.read_text())["rows"]]
        two = {seed: run["2 evaluations"] for seed, run in enumerate(runs)}
        for way in runs[0]:
            values = {seed: run[way] for seed, run in enumerate(runs)}
            ratio = "-" if values == two else str(paired_ratio(values, two))
            cells = [*(f"{value:.{1 if value > 1 else 3}f}" for value in values.values()), ratio]
            there.add((d, re.sub(r"gate, [\d.]+", "gate", way), " | ".join(cells)))
    assert there
    assert set(said) == there


def test_ratios_of_two_arms_are_what_their_command_prints(monkeypatch: pytest.MonkeyPatch):
    printed = what_prints("methods.json", monkeypatch)
    assert "['trajectory', 'over', 'digits', '0.91 (0.72 .. 1.13)', '0.96 (0.83 .. 1.13)']" in printed
    assert "| `trajectory` | `digits` | 3 | 0.91 (0.72 .. 1.13) | 0.96 (0.83 .. 1.13) |" in EVIDENCE


def test_what_5_percent_cost_is_what_its_command_prints(monkeypatch: pytest.MonkeyPatch):
    printed = what_prints("outliers_five_seeds.json", monkeypatch)
    one, two = re.findall(r"(\S+ \(.*?\))", printed.replace(" ..", " to"))
    assert one.split()[0] + " times (" + one.split("(")[1] in EVIDENCE
    assert two in EVIDENCE
