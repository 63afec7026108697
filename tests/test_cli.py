"""The command line: any order, one line for a mistake, help without torch, files that are not what they seem."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from analysis import c_schedules, loss_shapes, td_outliers
from reference_trainer.__main__ import main, parser
from reference_trainer.ablation.ablate import jobs_of
from reference_trainer.ablation.ladder import ARMS, SUITES
from reference_trainer.command import COMMANDS
from reference_trainer.commands.shared import require_writable
from reference_trainer.commands.train import configuration
from reference_trainer.errors import UserError, exit_status
from reference_trainer.files import load_tensors, save_tensors
from reference_trainer.machine import cache_folder
from reference_trainer.options import override, to_json
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
    assert page.count("\n") <= 76
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


# --- Files that are not what they should be ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on the pixels of a few images."""
    folder = tmp_path_factory.mktemp("trained")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)
    (folder / "images").mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / "images" / f"{index}.png")
    assert main([*TINY, "--data", str(folder / "images"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def stored(**changes: object) -> bytes:
    return json.dumps(to_json(digits()) | changes).encode()


NO_CONFIGURATIONS = {
    "list": b"[]",
    "string": b'"steps"',
    "number": b"3",
    "null": b"null",
    "empty": b"",
    "part": b'{"part": "DiT"}',
    "function": b'{"part": "cauchy"}',
    "unknown key": stored(stps=3),
    "unknown part": stored(network={"part": "Transformer9000"}),
    "part of another field": stored(network={"part": "Adam"}),
    "text for a number": stored(steps="ten"),
    "number for a part": stored(objective=3),
    "true for a number": stored(steps=True),
    "half a step": stored(steps=2.5),
    "list for a number": stored(ema_decay=[0.5]),
    "refused by its owner": stored(steps=0),
    "too large": stored(seed=10**40),
    "NaN": stored(ema_decay=float("nan")),
    "Infinity": stored(ema_decay=float("inf")),
    "UTF-16": stored().decode().encode("utf-16"),
    "deep": b"[" * 100_000,
    "parts in parts": b'{"part": "DiT", "width": ' * 480 + b"1" + b"}" * 480,
}


@pytest.mark.parametrize("content", NO_CONFIGURATIONS.values(), ids=NO_CONFIGURATIONS)
@pytest.mark.parametrize("words", [["sample"], ["evaluate"], ["--out"], ["digits", "--out"]], ids=" ".join)
def test_a_config_that_is_none_gets_one_line(
    words: list[str], content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_bytes(content)
    assert main([*words, str(tmp_path)]) == 2
    assert str(tmp_path) in said(capsys)


@pytest.mark.parametrize("content", ["list", "string", "number", "null"])
def test_what_is_no_configuration_is_not_compared_with_one(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(NO_CONFIGURATIONS[content])
    with pytest.raises(UserError, match="is no configuration of a run"):
        RunFolder(tmp_path).claim(digits())


def test_a_picture_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    for name, why in (("x.nothing", "unknown file extension"), ("file/x.png", ""), (".", "is a folder")):
        with pytest.raises(
            UserError, match=f"cannot write {re.escape(str(tmp_path / name))}: .*{why}.* --out"
        ) as caught:
            require_writable(tmp_path / name)
        assert ".trial" not in str(caught.value)
    require_writable(tmp_path / "new" / "x.png")
    assert not list((tmp_path / "new").iterdir())


def claimed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A run folder of the digits whose config.json was changed as if another version had written it."""
    RunFolder(tmp_path).claim(digits())
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_run_is_not_lost_because_a_version_added_a_field(tmp_path: Path):
    def older(config: dict[str, Any]) -> None:
        del config["threads"], config["objective"]["c"]["histogram"], config["optimizer"]["max_norm"]

    root = claimed(tmp_path, older)
    RunFolder(root).claim(digits())
    with pytest.raises(UserError, match=r"another configuration \(threads: 1 -> 2\)"):
        RunFolder(root).claim(replace(digits(), threads=2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.update(speed=3), "TrainConfig.speed"),
        (lambda config: config["optimizer"].update(clip=1.0), "Adam.clip"),
    ],
)
def test_a_field_that_a_version_took_away_is_named_with_what_to_do(
    change: Callable[[dict[str, Any]], object], named: str, tmp_path: Path
):
    with pytest.raises(UserError, match=f"run of another version of the trainer: {named} .* version that made it"):
        RunFolder(claimed(tmp_path, change)).claim(digits())


def test_a_config_json_of_something_else_is_named_as_such(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"lr": 3}')
    with pytest.raises(UserError, match="is no configuration of a run"):
        RunFolder(tmp_path).claim(digits())


def test_a_config_may_be_a_folder_and_a_run_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    (tmp_path / "file").write_text("no run")
    for words in (["sample", "run"], ["--out", "run"], ["--out", "file"], ["digits", "--out", "file/run"]):
        assert main([*words[:-1], str(tmp_path / words[-1])]) == 2
        assert str(tmp_path) in said(capsys)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_nothing_can_be_locked_the_run_goes_on_and_says_so(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object) -> None:
        raise OSError(code, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path).locked():
        pass
    assert "is not locked (not here)" in capsys.readouterr().out


def test_a_locked_folder_is_refused(tmp_path: Path):
    with RunFolder(tmp_path).locked(), pytest.raises(UserError, match="another process"), RunFolder(tmp_path).locked():
        pass


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_a_foreign_file_among_the_checkpoints_is_named_and_passed_over(run: Path, capsys: pytest.CaptureFixture[str]):
    (newest, *_) = RunFolder(run).checkpoints()
    spoilt = newest.parent
    (spoilt / "step_zero.safetensors").write_bytes(pickle.dumps(Evil()))
    (spoilt / "step_folder.safetensors").mkdir()
    save_tensors(spoilt / "step_about.safetensors", {"a": torch.zeros(2)}, {"step": "ten"})
    (spoilt / "step_cut.safetensors").write_bytes(newest.read_bytes()[:-9])
    assert RunFolder(run).latest_checkpoint()[0] == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("falling back to the checkpoint before" in line and str(spoilt) in line for line in lines)


def without_moments(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("exp_avg")]:
        del tensors[name]


def wider(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "/network." in name]:
        tensors[name] = (
            tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1)) if tensors[name].dim() else tensors[name]
        )


def half(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.is_floating_point() else tensor


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["ema/one_more"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(without_moments, ["--out"]), *itertools.product([wider, half, empty, one_more], [["--out"], ["sample"]])],
)
def test_a_checkpoint_of_something_else_gets_one_line(
    words: list[str], spoil, run: Path, capsys: pytest.CaptureFixture[str]
):
    (newest, *_) = RunFolder(run).checkpoints()
    tensors, about = load_tensors(newest)
    spoil(tensors)
    save_tensors(newest, tensors, about)
    capsys.readouterr()
    assert main([*words, str(run), "--device=cpu"]) == 2
    assert "does not fit" in said(capsys)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_what_is_no_run_or_not_trained_yet_is_said(command: str, run: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(run / "checkpoints")
    assert main([command, str(run)]) == 2
    assert "train it first, with the same --out" in said(capsys)
    assert main([command, str(run / "nowhere")]) == 2
    assert "no run at" in said(capsys)
