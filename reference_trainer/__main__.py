"""The command line. `python -m reference_trainer` trains, reports, and continues what was interrupted."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from reference_trainer.ablation import ablate
from reference_trainer.config import TrainConfig
from reference_trainer.data.images import ImageSet
from reference_trainer.errors import UserError, exit_status
from reference_trainer.evaluation.evaluate import (
    Evaluator,
    as_table,
    choose_features,
    evaluate,
    record,
    write_evaluation,
    write_report,
)
from reference_trainer.evaluation.features import Features, Imported, tried
from reference_trainer.machine import cache_folder, device_of, keep_freed_memory
from reference_trainer.model import load_model
from reference_trainer.options import CHOICES, describe, override
from reference_trainer.plotting import OWN_PICTURE, tile
from reference_trainer.presets import PRESETS, on_data
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import check_labels
from reference_trainer.training.loop import elapsed, train

COMMANDS = ("train", "sample", "evaluate", "ablate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in (*COMMANDS, "-h", "--help"):
        given.insert(0, "train")
    options = parser().parse_args(given)
    return exit_status(lambda: int(options.run_command(options)))


def parser() -> argparse.ArgumentParser:
    """The parser, with a help that teaches."""
    top = argparse.ArgumentParser(
        prog="python -m reference_trainer",
        description=__doc__,
        epilog="Without a command: train. `python -m reference_trainer train --help` shows presets and options.",
    )
    commands = top.add_subparsers(required=True, metavar="{train,sample,evaluate,ablate}")

    training = commands.add_parser(
        "train",
        help="train, or continue, a run; then evaluate it and draw its pictures",
        description="Train a latent consistency model. The same command again continues where the last one stopped.",
        epilog=training_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    training.add_argument("preset", nargs="?", default=None, metavar="PRESET", help=f"default: {PRESETS[0].__name__}")
    training.add_argument("options", nargs="*", metavar="path.to.field=value", help="change one field; see below")
    training.add_argument("--data", metavar="PATH", help="a folder of images (default: the embedded digits)")
    training.add_argument(
        "--run",
        metavar="DIR",
        type=Path,
        help="run folder (default: runs/PRESET or runs/PRESET-DATA); alone, with a folder that is a run: continue that "
        "run as it is configured",
    )
    training.add_argument("--features", metavar="MODULE:FUNCTION", help="feature network for the metrics, see evaluate")
    training.add_argument(
        "--brief", action="store_true", help="at the end measure the samples alone, without floor, ceiling and pictures"
    )
    training.add_argument(
        "--new-data",
        action="store_true",
        help="go on though the images or the pretrained autoencoder have changed: weights, fitted autoencoder and "
        "normalisation stay those of the run, the images are encoded anew",
    )
    training.add_argument("--show", action="store_true", help="print the resolved configuration and stop")
    training.set_defaults(run_command=run_train)

    sampling = commands.add_parser("sample", help="draw images from a run")
    sampling.add_argument("run", type=Path, metavar="RUN")
    sampling.add_argument("--n", type=int, default=64, help="number of images (default 64)")
    sampling.add_argument("--evaluations", type=int, default=1, help="network evaluations an image (default 1)")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--out", type=Path, help="PNG to write (default: RUN/samples-N-NFE-SEED.png)")
    sampling.set_defaults(run_command=run_sample)

    evaluating = commands.add_parser("evaluate", help="measure a run: Frechet and kernel distance, precision, recall")
    evaluating.add_argument("run", type=Path, metavar="RUN")
    evaluating.add_argument(
        "--features",
        metavar="MODULE:FUNCTION",
        help="an importable function that returns a map from uint8 images [n, ch, h, w] to features [n, k] "
        "(default: a digit classifier for digits, the run's own autoencoder for other images)",
    )
    evaluating.add_argument("--seed", type=int, default=0)
    evaluating.add_argument(
        "--new-data",
        action="store_true",
        help="compare with the images that are there now, though the run was made from others",
    )
    evaluating.set_defaults(run_command=run_evaluate)

    ablating = ablate.add_parser(commands)
    ablating.set_defaults(run_command=ablate.run_ablate)

    for command in (training, sampling, evaluating, ablating):
        command.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    return top


def training_help() -> str:
    """Presets, fields with their defaults, and what each exchangeable field takes."""
    lines = ["presets:"]
    for preset in PRESETS:
        lines.append(f"  {preset.__name__:10} {(preset.__doc__ or '').strip().splitlines()[0]}")
    lines += ["", f"fields, with the defaults of the preset {PRESETS[0].__name__}:"]
    lines += [f"  {path}={value}" for path, value in leaves(PRESETS[0]())]
    lines += ["", "fields that take a part, written as in Python:"]
    lines += [f"  {owner.__name__}.{field}: {describe(choices)}" for (owner, field), choices in CHOICES.items()]
    lines += [
        "",
        "examples:",
        "  python -m reference_trainer ilct",
        "  python -m reference_trainer paper objective.gate='Above(3)' objective.c='MeasuredC(multiple=0.5)'",
        "  python -m reference_trainer --data photos autoencoder.latent_channels=8 steps=20000 --run runs/photos",
        "  python -m reference_trainer --data photos \"autoencoder=PretrainedAutoencoder(load='my_vae:load')\"",
    ]
    return "\n".join(lines)


def leaves(part: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every field below ``part`` that holds a plain value or a function, as (dotted path, value to show)."""
    out: list[tuple[str, Any]] = []
    for field in fields(part):
        value, name = getattr(part, field.name), f"{path}.{field.name}" if path else field.name
        if is_dataclass(value):
            out += [(name, f"{type(value).__name__}(...)"), *leaves(value, name)]
        else:
            out.append((name, getattr(value, "__name__", value)))
    return out


def configuration(options: argparse.Namespace) -> tuple[str, TrainConfig]:
    """Preset, data and options of the command line, resolved; with the name of the preset."""
    changes = list(options.options)
    if options.preset is not None and "=" in options.preset:  # no preset was given
        changes.insert(0, options.preset)
        options.preset = None
    presets = {preset.__name__: preset for preset in PRESETS}
    name = options.preset or PRESETS[0].__name__
    if name not in presets:
        raise UserError(f"unknown preset {name}: there are {', '.join(presets)}")
    config = on_data(presets[name](), options.data)
    for change in changes:
        config = override(config, change)
    return name, config


def run_train(options: argparse.Namespace) -> int:
    """Train, evaluate, draw."""
    started = time.monotonic()
    bare = options.preset is None and not options.options and options.data is None
    if bare and options.run is not None and (options.run / "config.json").exists():
        name, config = options.run.name, RunFolder(options.run).config()
    else:
        name, config = configuration(options)
    if options.show:
        print("\n".join(f"{path}={value}" for path, value in leaves(config)))
        return 0
    suffix = f"-{Path(options.data).name}" if options.data is not None else ""
    run, device = RunFolder(options.run or Path("runs") / f"{name}{suffix}"), device_of(options.device)
    torch.set_num_threads(config.threads)
    images = config.data.load()
    check_labels(config, images.train_labels)  # before the folder is claimed for what cannot be trained
    features = named_features(options.features, images)
    with run.locked():
        run.claim(config)
        judge = Evaluator(run, images, features)
        if not train(config, run, images, cache_folder(), device, judge, options.new_data):
            print(f"stopped and saved in {run.root}; run the same command again to continue")
            return 130
        model = load_model(run, device)
        evaluation = evaluate(model, images, choose_features(features, model), bounds=not options.brief)
        print(as_table(evaluation), flush=True)  # before anything is written: a full disk shall not cost the figures
        record(run, evaluation)
        if options.brief:
            write_evaluation(run, evaluation)
        else:
            files = write_report(run, model, images, evaluation)
    if not options.brief:
        print(f"{elapsed(started)}; look at {', '.join(str(file) for file in files)}")
    return 0


def named_features(name: str | None, images: ImageSet) -> Features | None:
    """What ``--features`` names, imported and tried on two images.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    return None if name is None else tried(Imported.of(name), images.pixels)


def run_sample(options: argparse.Namespace) -> int:
    """One PNG of samples."""
    if options.n < 1:
        raise UserError(f"--n must be at least 1, got {options.n}")
    model = load_model(RunFolder(options.run), device_of(options.device))
    torch.set_num_threads(model.config.threads)
    file = options.out or options.run / f"samples-{options.n}-{options.evaluations}-{options.seed}.png"
    require_writable(file)
    pixels = model.images(options.n, model.sigmas(options.evaluations), options.seed)
    save_picture(pixels, file)
    print(f"{options.n} images, NFE {options.evaluations}: {file}")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """The table, and the report anew."""
    run, device = RunFolder(options.run), device_of(options.device)
    config = run.config()
    torch.set_num_threads(config.threads)
    images = config.data.load()
    features = named_features(options.features, images)
    model = load_model(run, device, images, options.new_data)
    evaluation = evaluate(model, images, choose_features(features, model), options.seed)
    print(as_table(evaluation), flush=True)
    files = write_report(run, model, images, evaluation)
    print(f"look at {', '.join(str(file) for file in files)}")
    return 0


def require_writable(file: Path) -> None:
    """Refuse a picture's name before the time it takes to draw what goes there.

    Raises:
        UserError: its folder cannot be written, or its ending is that of no picture.
    """
    trial = file.with_name(f".trial-{file.name}")
    save_picture(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), trial)
    trial.unlink()


def save_picture(pixels: torch.Tensor, file: Path) -> None:
    """uint8 ``[n, ch, h, w]`` as one PNG of square rows."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    columns = max(1, round(len(pixels) ** 0.5))
    padding = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((padding, *pixels.shape[1:]), 255)])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        about = PngInfo()
        for key, text in OWN_PICTURE.items():
            about.add_text(key, text)
        Image.fromarray(tile(pixels, columns)).save(file, pnginfo=about)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {file}: {error}") from error


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
