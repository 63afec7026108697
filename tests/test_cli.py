"""The command line: any order, one line for a mistake, help without torch, files that are not what they seem."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from analysis import c_schedules, loss_shapes, td_outliers
from reference_trainer.__main__ import main, parser
from reference_trainer.ablation.ablate import jobs_of
from reference_trainer.ablation.ladder import ARMS, SUITES
from reference_trainer.command import COMMANDS, Parser
from reference_trainer.commands.train import configuration
from reference_trainer.errors import UserError, exit_status
from reference_trainer.machine import cache_folder
from reference_trainer.options import override
from reference_trainer.presets import PRESETS, digits
from reference_trainer.run import RunFolder
from robustcm import __version__

ROOT = Path(__file__).parents[1]
TINY = ["pixels", "steps=3", "batch_size=8", "save_every=2", "data.resolution=16", "objective.gate=Above(1)"]
TINY += ["network=DiT(width=8,layers=1,heads=2,patch=16)", "--device=cpu", "--brief"]


def resolved(*words: str):
    return configuration(parser().parse_args(["train", *words]))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: one line, and not a traceback."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


# --- Order ------------------------------------------------------------------------------------------------------------


def test_words_and_options_come_in_any_order(tmp_path: Path):
    groups = [["paper"], ["steps=10"], ["--data", str(tmp_path)], ["--brief"], ["objective.gate=Above(3)"]]
    name, config = resolved(*itertools.chain(*groups))
    assert (name, config.steps, config.data.path) == ("paper", 10, str(tmp_path))
    for order in itertools.permutations(groups):
        assert resolved(*itertools.chain(*order)) == (name, config)


def test_a_word_among_the_values_of_an_option_is_a_word_but_not_where_such_words_are_its_values():
    parser = Parser()
    parser.add_argument("words", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arm", nargs="+", action="append")
    found = parser.parse_args(["digits", "--seeds", "0", "network.width=8", "1", "--arm", "paper", "steps=9", "seed=3"])
    assert found.words == ["network.width=8", "digits"]
    assert found.seeds == [0, 1]
    assert found.arm == [["paper", "steps=9", "seed=3"]]


def test_data_changes_the_preset_and_words_change_the_data_wherever_they_stand(tmp_path: Path):
    _, config = resolved("batch_size=5", "data.resolution=16", "--data", str(tmp_path))
    assert (config.batch_size, config.data.resolution) == (5, 16)


def test_of_a_value_given_twice_the_last_counts_and_that_is_said(capsys: pytest.CaptureFixture[str]):
    _, config = resolved("steps=1", "--out=a", "steps=2", "--out=b")
    assert config.steps == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [f"{name} is given more than once: the last one counts" for name in ("--out", "steps")]


def test_a_home_folder_is_found_behind_an_equals_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parser().parse_args(["train", "--out=~/x", "--data=~/y"])
    assert options.run == tmp_path / "x"
    assert configuration(options)[1].data.path == str(tmp_path / "y")
    monkeypatch.setenv("ROBUSTCM_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    assert parser().parse_args(["sample", "~nobody-of-that-name/x"]).run == Path("~nobody-of-that-name/x")


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stpes", "3"], "unknown option --stpes, did you mean steps=VALUE?"),
        (["--lr", "0.1"], "did you mean learning_rate.lr=VALUE?"),
        (["--learning-rate.lr=0.1"], "did you mean learning_rate.lr=VALUE?"),
        (["--batch-size=3"], "did you mean batch_size=VALUE?"),
        (["--shwo"], "did you mean --show?"),
        (["stps=3"], "did you mean steps?"),
        (["ilct", "paper"], "ilct and paper are 2 presets"),
        (["ilct", "--data", "x", "paper"], "ilct and paper are 2 presets"),
        (["papper"], "unknown preset papper, did you mean paper?"),
        (["ILCT"], "unknown preset ILCT, did you mean ilct?"),
        (["evalute", "runs/x"], "unknown preset evalute, did you mean evaluate?"),
        (["--brief", "sample"], "sample is a command: it comes first"),
        (["steps"], "steps needs a value"),
        (["--data"], "expected one argument"),
        (["--out", ""], "the path is empty"),
        (["--device", "meta"], "--device meta"),
        (["--fields", "objective.cc"], "did you mean c?"),
        (["sample"], "required: RUN"),
        (["sample", "runs/x", "runs/y"], "no place for the word 'runs/y'"),
        (["sample", "runs/x", "--n=many"], "must be a whole number, got 'many'"),
        (["sample", "runs/x", "--seed", "1" + "0" * 30], "must be a whole number"),
        (["evaluate", "x", "--feature=a:b"], "did you mean --features?"),
        (["help", "smple"], "invalid choice"),
        (["ablate", "--arms", "ilct"], "did you mean iLCT?"),
        (["ablate", "steps=3"], "give them with --steps"),
        (["ablate", "--arm", "digits", "seed=3"], "give them with --steps and --seeds"),
        (["ablate", "--seconds=0"], "--seconds must be positive"),
        (["ablate", "--seconds=inf"], "--seconds must be positive"),
        (["ablate", "--seconds=nan"], "--seconds must be positive"),
        (["ablate", "--workers=0"], "--workers must be positive"),
        (["ablate", "--arm", "digits", "--arm", "digits"], "2 arms of one name"),
    ],
)
def test_a_slip_gets_one_line_that_helps(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in said(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [td_outliers, loss_shapes, c_schedules], ids=lambda s: s.__name__)
def test_the_scripts_of_the_analysis_do_so_too(script, capsys: pytest.CaptureFixture[str]):
    assert script.main(["--leves=3"]) == 2
    assert "did you mean --levels?" in said(capsys)
    assert script.main(["--samples=3", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_what_is_behind_an_error(capsys: pytest.CaptureFixture[str]):
    words = ["objective.c=MeasuredC(q=2)", "--show"]
    assert main(words) == 2
    said(capsys)
    for debug in ([*words, "--debug"], ["--debug", *words]):
        assert main(debug) == 2
        error = capsys.readouterr().err
        assert "direct cause" in error
        assert "ValueError" in error
        assert error.splitlines()[-1].startswith("error: option objective.c=")


def test_a_fault_of_ours_is_one_line_too_and_not_the_users(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def broken(self: RunFolder):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(RunFolder, "config", broken)
    assert main(["sample", "runs/x"]) == 1
    assert re.search("unexpected RuntimeError: first line second line .*--debug", said(capsys))
    assert main(["sample", "runs/x", "--debug"]) == 1
    assert "in broken" in capsys.readouterr().err


def test_the_exit_status_says_how_it_ended(capsys: pytest.CaptureFixture[str]):
    def raising(error: BaseException):
        def work() -> int:
            raise error

        return work

    assert exit_status(lambda: 7) == 7
    assert exit_status(raising(UserError("mend it"))) == 2
    assert exit_status(raising(KeyboardInterrupt())) == 130
    assert exit_status(raising(ZeroDivisionError())) == 1
    assert "unexpected ZeroDivisionError: no message" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_no_error():
    work = "sys.exit(exit_status(lambda: print('a line\\n' * 10**6)))"
    script = f"import sys; from reference_trainer.errors import exit_status; {work}"
    command = f"{shlex.join([sys.executable, '-c', script])} | head -n 1"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("a line\n", "")


# --- The run folder's option ------------------------------------------------------------------------------------------


def test_torchrun_takes_no_option_of_train_for_its_own():
    assert get_args_parser().parse_args(["--nproc-per-node=2", "-m", "reference_trainer", "ilct"]).module
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    (training, *_) = [action.choices["train"] for action in parser()._actions if action.choices]
    ours = {name for action in training._actions for name in action.option_strings} - {"-h", "--help"}
    taken = {name for name in ours if any(option.startswith(name) for option in theirs)}
    assert taken == {"--run"}, "the alias, which the help does not show"


def test_run_is_a_silent_name_of_out(capsys: pytest.CaptureFixture[str]):
    assert parser().parse_args(["train", "--run", "x"]).run == parser().parse_args(["train", "--out", "x"]).run
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--run" not in capsys.readouterr().out
    mentions = [
        (file.name, line)
        for file in (ROOT / "reference_trainer").rglob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r"--run\b", line)
    ]
    assert [name for name, _ in mentions] == ["train.py"], mentions


# --- Help -------------------------------------------------------------------------------------------------------------


def printed_by(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_train_is_a_page(capsys: pytest.CaptureFixture[str]):
    page = printed_by(["train", "--help"], capsys)
    assert page.count("\n") <= 77
    assert max(map(len, page.splitlines())) <= 120
    for preset in PRESETS:
        assert re.search(rf"^  {preset.__name__} +{re.escape(preset.__doc__.splitlines()[0])}$", page, re.MULTILINE)
    shown = re.findall(r"^  ([\w.]+=\S+) ", page, re.MULTILINE)
    assert len(shown) >= 12
    for option in shown:  # as if the default had been typed
        assert override(digits(), option) == digits(), option
    for example in re.findall(r"^  python -m reference_trainer (.*?)(?:   .*)?$", page, re.MULTILINE):
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {example}"], capture_output=True, text=True, check=True)
        assert configuration(parser().parse_args(["train", *words.stdout.removeprefix("train\n").splitlines()]))


def test_help_needs_no_command_and_version_no_run(capsys: pytest.CaptureFixture[str]):
    assert printed_by(["help"], capsys) == printed_by(["--help"], capsys)
    assert printed_by(["help", "sample"], capsys) == printed_by(["sample", "-h"], capsys)
    assert printed_by(["--version"], capsys) == f"robustcm {__version__}\n"


def test_help_and_slips_of_the_pen_import_no_torch():
    script = f"""
import sys
from reference_trainer.__main__ import main
for words in (["--help"], ["--version"], ["--shwo"], *([name, "--help"] for name in {COMMANDS})):
    try:
        main(words)
    except SystemExit:
        pass
print(sorted({{"torch", "numpy", "matplotlib", "diffusers", "torchmetrics"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_ablation_begins_with_the_first_suite_and_runs_no_seed_twice(tmp_path: Path):
    assert parser().parse_args(["ablate"]).suites == [SUITES[0].name]
    jobs = jobs_of([(ARMS[0], digits())], SUITES[:1], [3, 1, 3], tmp_path)
    assert [job.seed for job in jobs] == [3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuchpreset"], "unknown preset"),
        (["--data", "/no/such/folder"], "no folder of images"),
        (["batch_size=0"], "at least 1"),
        (["evaluate_every=-1"], "0 (at the end) or more"),
        (["sample", "/no/such/run"], "no run at"),
        (["evaluate", "/no/such/run"], "no run at"),
        (["--device", "nonsense"], "--device nonsense"),
        (["flow_map", "second_sigma=0.3"], "second_sigma is of consistency functions"),
        (["flow_map", "objective.extra=EarlyDiffusion"], "unknown option objective.extra"),
        (["trajectory", "objective.levels=LogitNormalTimes"], "takes LevelGrid"),
        (
            ["flow_map", "objective.target.share=ConstantShare(share=0)"],
            "share must be a finite number >= 1e-06 and <= 1",
        ),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
