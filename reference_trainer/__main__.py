"""The command line. `python -m reference_trainer` trains, reports, and continues what was interrupted."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reference_trainer.ablation.command import add_parser as add_ablate
from reference_trainer.command import Parser, did_you_mean, path, whole
from reference_trainer.errors import UserError, exit_status
from reference_trainer.manual import OFTEN, page
from robustcm import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.config import TrainConfig
    from reference_trainer.data.images import ImageSet
    from reference_trainer.evaluation.features import Features

COMMANDS = ("train", "sample", "evaluate", "encode", "ablate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get("RANK", "0") != "0":  # of several processes one talks
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (to the end of the process)
    words = [word for word in given if word != "--debug"]
    return exit_status(lambda: run(words), debug=words != given)


def run(words: list[str]) -> int:
    """Do what the words say; without a command: train."""
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    elif not words or words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        words = ["train", *words]
    options = parser().parse_args(words)
    from reference_trainer.machine import keep_freed_memory

    keep_freed_memory()
    return int(options.run_command(options))


def parser() -> Parser:
    """The parser, with a help that teaches."""
    top = Parser(
        prog="python -m reference_trainer",
        description=__doc__,
        epilog="Without a command: train. `python -m reference_trainer train --help` shows presets and options.",
    )
    top.add_argument("--version", action="version", version=f"robustcm {__version__}")
    commands = top.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")

    training = commands.add_parser(
        "train",
        usage="%(prog)s [PRESET] [path.to.field=value ...] [options]",
        help="train, or continue, a run; then evaluate it and draw its pictures",
        description="Train a latent consistency model. The same command again continues where the last one stopped.",
        epilog=page(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fields=[often.path for often in OFTEN],
    )
    training.add_argument(
        "words", nargs="*", default=[], metavar="WORD", help="a preset, and path.to.field=value for what differs"
    )
    training.add_argument(
        "--data",
        type=path,
        metavar="PATH",
        help="a folder of images, or a store of latents that encode wrote (default: the embedded digits)",
    )
    training.add_argument(
        "--out",
        dest="run",
        type=path,
        metavar="DIR",
        help="run folder (default: runs/PRESET or runs/PRESET-DATA); alone, with a run's folder: continue that run",
    )
    # Its first name. torchrun takes it for one of its own options, shortened, and stops.
    training.add_argument("--run", type=path, help=argparse.SUPPRESS)
    training.add_argument("--features", metavar="MODULE:FUNCTION", help="feature network for the metrics, see evaluate")
    training.add_argument("--brief", action="store_true", help="at the end measure the samples alone, no pictures")
    training.add_argument("--show", action="store_true", help="print the configuration, as one can type it, and stop")
    training.add_argument(
        "--fields", nargs="?", const="", metavar="PATH", help="print what every field (below PATH) does, and stop"
    )
    training.add_argument(
        "--new-data",
        action="store_true",
        help="go on though the images or the pretrained autoencoder have changed: weights, fitted autoencoder and "
        "normalisation stay those of the run, the images are encoded anew",
    )
    training.set_defaults(run_command=run_train)

    sampling = commands.add_parser("sample", help="draw images from a run")
    sampling.add_argument("run", type=path, metavar="RUN")
    sampling.add_argument("--n", type=whole, default=64, help="number of images (default 64)")
    sampling.add_argument("--evaluations", type=whole, default=1, help="network evaluations an image (default 1)")
    sampling.add_argument("--seed", type=whole, default=0)
    sampling.add_argument("--out", type=path, help="PNG to write (default: RUN/samples-N-NFE-SEED.png)")
    sampling.set_defaults(run_command=run_sample)

    evaluating = commands.add_parser("evaluate", help="measure a run: Frechet and kernel distance, precision, recall")
    evaluating.add_argument("run", type=path, metavar="RUN")
    evaluating.add_argument(
        "--features",
        metavar="MODULE:FUNCTION",
        help="an importable function that returns a map from uint8 images [n, ch, h, w] to features [n, k] "
        "(default: a digit classifier for digits, the run's own autoencoder for other images)",
    )
    evaluating.add_argument("--seed", type=whole, default=0)
    evaluating.add_argument(
        "--new-data",
        action="store_true",
        help="compare with the images that are there now, though the run was made from others",
    )
    evaluating.set_defaults(run_command=run_evaluate)

    encoding = commands.add_parser("encode", help="encode a folder of images into a store of latents to train on")
    encoding.add_argument("data", type=path, metavar="DATA", help="a folder of images; of class folders: with labels")
    encoding.add_argument("--out", type=path, required=True, metavar="STORE", help="folder for the latents")
    encoding.add_argument(
        "--autoencoder",
        metavar="AUTOENCODER",
        help="module:function that returns yours, or KLAutoencoder(...), fitted to the images (default)",
    )
    encoding.add_argument("--resolution", type=whole, default=64, help="side in pixels (default 64)")
    encoding.add_argument("--flips", action="store_true", help="also encode the mirrored images")
    encoding.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    encoding.add_argument("--shard", type=whole, default=4096, help="images a file (default 4096)")
    encoding.set_defaults(run_command=run_encode)

    ablating = add_ablate(commands)
    ablating.set_defaults(run_command=run_ablate)

    for command in (training, sampling, evaluating, encoding, ablating):
        command.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    return top


def configuration(options: argparse.Namespace) -> tuple[str, TrainConfig]:
    """Preset, data and options of the command line, resolved; with the name of the preset."""
    from reference_trainer.config import TrainConfig
    from reference_trainer.options import override
    from reference_trainer.presets import PRESETS, on_data

    presets = {preset.__name__: preset for preset in PRESETS}
    named = [word for word in options.words if "=" not in word]
    if unknown := [word for word in named if word not in presets]:
        raise UserError(what_is(unknown[0], list(presets), [field.name for field in dataclasses.fields(TrainConfig)]))
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} are {len(named)} presets: give one, and path.to.field=value for more")
    name = named[0] if named else PRESETS[0].__name__
    config = on_data(presets[name](), None if options.data is None else str(options.data))
    for word in options.words:
        if "=" in word:
            config = override(config, word)
    return name, config


def what_is(word: str, presets: Sequence[str], fields: Sequence[str]) -> str:
    """What to say about a word that is neither a preset nor an assignment."""
    if word in COMMANDS:
        return f"{word} is a command: it comes first"
    if word.partition(".")[0] in fields:
        return f"{word} needs a value, as in steps=1000; train --fields {word} says which it takes"
    there = ", ".join(presets)
    return f"unknown preset {word}{did_you_mean(word, (*presets, *COMMANDS, *fields)) or f': there are {there}'}"


def run_train(options: argparse.Namespace) -> int:
    """Train, evaluate, draw."""
    import torch

    from reference_trainer.evaluation.evaluate import (
        Evaluator,
        choose_features,
        evaluate,
        record,
        write_evaluation,
        write_report,
    )
    from reference_trainer.evaluation.table import as_table
    from reference_trainer.fields import describe_fields
    from reference_trainer.machine import cache_folder, device_of
    from reference_trainer.model import load_model
    from reference_trainer.options import as_options
    from reference_trainer.ranks import Ranks, own_device
    from reference_trainer.run import RunFolder
    from reference_trainer.training.batches import check_labels
    from reference_trainer.training.loop import elapsed, train

    started = time.monotonic()
    bare = not options.words and options.data is None
    if bare and options.run is not None and (options.run / "config.json").exists():
        name, config = options.run.name, RunFolder(options.run).config()
    else:
        name, config = configuration(options)
    if options.fields is not None:
        print(describe_fields(config, options.fields))
        return 0
    if options.show:
        print("\n".join(shlex.quote(option) for option in as_options(config)))
        return 0
    suffix = f"-{Path(options.data).name}" if options.data is not None else ""
    run, device = RunFolder(options.run or Path("runs") / f"{name}{suffix}"), own_device(device_of(options.device))
    torch.set_num_threads(config.threads)
    ranks = Ranks.join(device)
    with contextlib.ExitStack() as held:
        with ranks.first_leads():
            images = config.load_images(device)
            check_labels(config, images.train_labels)  # before the folder is claimed for what cannot be trained
            features = named_features(options.features, images)
            if ranks.leads:
                held.enter_context(run.locked())
                run.claim(config)
        judge = Evaluator(run, images, features)
        if not train(config, run, images, cache_folder(), device, judge, options.new_data, ranks):
            print(f"stopped and saved in {run.root}; run the same command again to continue")
            return 130
        if not ranks.leads:
            return 0
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
    from reference_trainer.evaluation.features import Imported, tried

    return None if name is None else tried(Imported.of(name), images.pixels)


def run_sample(options: argparse.Namespace) -> int:
    """One PNG of samples."""
    import torch

    from reference_trainer.machine import device_of
    from reference_trainer.model import load_model
    from reference_trainer.run import RunFolder

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
    import torch

    from reference_trainer.evaluation.evaluate import choose_features, evaluate, write_report
    from reference_trainer.evaluation.table import as_table
    from reference_trainer.machine import device_of
    from reference_trainer.model import load_model
    from reference_trainer.run import RunFolder

    run, device = RunFolder(options.run), device_of(options.device)
    config = run.config()
    torch.set_num_threads(config.threads)
    images = config.load_images(device)
    features = named_features(options.features, images)
    model = load_model(run, device, images, options.new_data)
    evaluation = evaluate(model, images, choose_features(features, model), options.seed)
    print(as_table(evaluation), flush=True)
    files = write_report(run, model, images, evaluation)
    print(f"look at {', '.join(str(file) for file in files)}")
    return 0


def run_encode(options: argparse.Namespace) -> int:
    """A store of latents."""
    from reference_trainer.data.encode import Encoding, encode_folder
    from reference_trainer.data.images import ImageFolder
    from reference_trainer.data.shards import DTYPES
    from reference_trainer.machine import cache_folder, device_of
    from reference_trainer.options import override
    from reference_trainer.presets import PRESETS, on_folder

    config = on_folder(PRESETS[0](), str(options.data))
    if (given := options.autoencoder) is not None:
        part = f"PretrainedAutoencoder(load={given!r})" if ":" in given and "(" not in given else given
        config = override(config, f"autoencoder={part}")
    (dtype,) = (name for name, found in DTYPES.items() if str(found) == f"torch.{options.dtype}")
    try:
        encoding = Encoding(
            source=ImageFolder(path=str(options.data), resolution=options.resolution),
            autoencoder=config.autoencoder,
            flips=options.flips,
            dtype=dtype,
            shard=options.shard,
        )
    except ValueError as error:
        raise UserError(f"encode: {error}") from error
    index = encode_folder(encoding, options.out, device_of(options.device), cache_folder())
    classes = f"{index.classes} classes" if index.classes else "no classes"
    print(
        f"{index.count} latents of {' x '.join(map(str, index.shape))} ({index.held_out} held out, {classes}) in "
        f"{len(index.shards)} shards: {options.out}"
    )
    print(f"train on them: python -m reference_trainer --data {shlex.quote(str(options.out))}")
    return 0


def require_writable(file: Path) -> None:
    """Refuse a picture's name before the time it takes to draw what goes there.

    Raises:
        UserError: its folder cannot be written, or its ending is that of no picture.
    """
    import torch

    if file.is_dir():
        raise UserError(f"cannot write {file}: it is a folder; give --out a file, as in {file / 'samples.png'}")
    trial = file.with_name(f".trial-{file.name}")
    save_picture(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), trial, called=file)
    trial.unlink()


def run_ablate(options: argparse.Namespace) -> int:
    """Compare the arms."""
    from reference_trainer.ablation import ablate

    return ablate.run_ablate(options)


def save_picture(pixels: Tensor, file: Path, called: Path | None = None) -> None:
    """uint8 ``[n, ch, h, w]`` as one PNG of square rows; an error calls it ``called``."""
    import torch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from reference_trainer.plotting import OWN_PICTURE, tile

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
        why = (isinstance(error, OSError) and error.strerror) or str(error).rstrip(": ")
        raise UserError(f"cannot write {called or file}: {why}; give --out a place for a PNG") from error


if __name__ == "__main__":
    sys.exit(main())
