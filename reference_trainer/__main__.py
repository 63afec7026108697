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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reference_trainer.ablation.command import add_parser as add_ablate
from reference_trainer.command import Parser, did_you_mean, path, program, real, whole
from reference_trainer.errors import UserError, exit_status
from reference_trainer.manual import ENCODE_EXAMPLES, OFTEN, page
from robustcm import __version__

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reference_trainer.config import TrainConfig
    from reference_trainer.data.images import ImageSet
    from reference_trainer.evaluation.features import Features
    from reference_trainer.model import TrainedModel

GUIDANCE = "of a run trained by class: weight of guidance (default: the run's, which is 1, none, unless set)"
OF_THE_EXTRA = (
    "diffusers",
    "einops",
    "matplotlib",
    "mlxtend",
    "PIL",
    "safetensors",
    "tensorboard",
    "torchmetrics",
    "tqdm",
)
"""Modules of the extra ``trainer``; who installs the core alone has this command, too."""
COMMANDS = ("train", "sample", "evaluate", "encode", "ablate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"]
    work: Callable[[], int]
    work, leads = partial(run, words), os.environ.get("RANK", "0") == "0"
    if not leads:  # of several processes one talks
        from reference_trainer.ranks import following

        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (to the end of the process)
        work = partial(following, work)
    return exit_status(work, debug=words != given, leads=leads)


def run(words: list[str]) -> int:
    """Do what the words say; without a command: train."""
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    elif not words or words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        words = ["train", *words]
    options = parser().parse_args(words)
    try:
        from reference_trainer.machine import keep_freed_memory

        keep_freed_memory()
        return int(options.run_command(options))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OF_THE_EXTRA:
            raise
        raise UserError(f"the trainer needs {error.name}: pip install 'robustcm[trainer]' brings it") from error


def parser() -> Parser:
    """The parser, with a help that teaches."""
    top = Parser(
        prog=program(),
        description=__doc__,
        epilog="Without a command: train. `python -m reference_trainer train --help` shows presets and options. "
        "Exit status: 0 done; 2 something of yours to mend, said in one line; 1 a fault; 130 Ctrl-C; 75 SIGTERM, as a "
        "scheduler sends it. After Ctrl-C and SIGTERM what was done is saved: the same command again goes on.",
    )
    top.add_argument("--version", action="version", version=f"robustcm {__version__}")
    commands = top.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")

    training = commands.add_parser(
        "train",
        usage="%(prog)s [DATA] [RECIPE] [path.to.field=value ...] [options]",
        help="train, or continue, a run; then evaluate it and draw its pictures",
        description="Train a latent consistency model. The same command again continues where the last one stopped.",
        epilog=page(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fields=[often.path for often in OFTEN],
    )
    training.add_argument(
        "words", nargs="*", default=[], metavar="WORD", help="presets of data and recipe, and path.to.field=value"
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
        help="run folder (default: runs/PRESETS or runs/PRESETS-DATA); alone, with a run's folder: continue that run",
    )
    # Its first name. torchrun takes it for one of its own options, shortened, and stops.
    training.add_argument("--run", type=path, help=argparse.SUPPRESS)
    training.add_argument("--features", metavar="FEATURES", help="feature network for the metrics, see evaluate")
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
    training.add_argument(
        "--sharded",
        action="store_true",
        help="of several processes (torchrun) each holds its share of weights, averages and moments, for networks that "
        "do not fit on one GPU; a run may change between with and without",
    )
    training.set_defaults(run_command=run_train)

    sampling = commands.add_parser("sample", help="draw images from a run")
    sampling.add_argument("run", type=path, metavar="RUN")
    sampling.add_argument("--n", type=whole, default=64, help="number of images (default 64)")
    sampling.add_argument("--evaluations", type=whole, default=1, help="network evaluations an image (default 1)")
    sampling.add_argument("--seed", type=whole, default=0)
    sampling.add_argument(
        "--label", metavar="CLASS", help="of a run trained by class: name or number of one (default: a row for each)"
    )
    sampling.add_argument("--guidance", type=real, metavar="W", help=GUIDANCE)
    sampling.add_argument("--average", metavar="AVERAGE", help="of the weights, see evaluate")
    sampling.add_argument("--out", type=path, help="PNG to write (default: RUN/samples-N-NFE-SEED[-...].png)")
    sampling.set_defaults(run_command=run_sample)

    evaluating = commands.add_parser("evaluate", help="measure a run: Frechet and kernel distance, precision, recall")
    evaluating.add_argument("run", type=path, metavar="RUN")
    evaluating.add_argument(
        "--features",
        metavar="FEATURES",
        help="inception (FID, KID) or dinov2 (FD-DINOv2), through torch-fidelity; a TorchScript file, .pt or .ts; or "
        "an importable module:function that returns a map from uint8 images [n, ch, h, w] to features [n, k] "
        "(default: a digit classifier for digits, the run's own autoencoder for other images)",
    )
    evaluating.add_argument(
        "--samples",
        type=whole,
        default=5000,
        metavar="N",
        help="images to draw, and training images to compare them with, as far as there are so many (default 5000)",
    )
    evaluating.add_argument("--seed", type=whole, default=0)
    evaluating.add_argument("--guidance", type=real, metavar="W", help=GUIDANCE)
    evaluating.add_argument(
        "--new-data",
        action="store_true",
        help="compare with the images that are there now, though the run was made from others",
    )
    weights = evaluating.add_mutually_exclusive_group()
    weights.add_argument(
        "--average",
        metavar="AVERAGE",
        help="of the weights: Exponential(decay=...) that the run keeps (decay=0: the weights themselves), or "
        "PowerFunction(sigma_rel=...), kept or reconstructed of its snapshots (default: that of ema_decay)",
    )
    weights.add_argument(
        "--averages",
        action="store_true",
        help="instead: Frechet distances by average, of those the run keeps and a ladder of sigma_rel; averages.png",
    )
    evaluating.set_defaults(run_command=run_evaluate)

    encoding = commands.add_parser(
        "encode",
        help="encode images into a store of latents to train on",
        description="Started several times, or by torchrun, the processes share the work. Whoever was interrupted: the "
        "same command again goes on at the next shard.",
        epilog=ENCODE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    encoding.add_argument(
        "data",
        type=path,
        metavar="DATA",
        help="a folder of images or a zip of one, with labels from its class folders or from EDM's dataset.json; or a "
        "Hugging Face dataset: its folder, or its name on the hub",
    )
    encoding.add_argument("--split", metavar="NAME", help="read this one, of folders or splits such as train and val")
    encoding.add_argument("--subset", metavar="NAME", help="of a Hugging Face dataset: its configuration")
    encoding.add_argument("--image-column", metavar="NAME", help="of a Hugging Face dataset with several of images")
    encoding.add_argument("--label-column", metavar="NAME", help="of a Hugging Face dataset with several of classes")
    encoding.add_argument("--out", type=path, metavar="STORE", help="folder for the latents")
    encoding.add_argument(
        "--autoencoder",
        metavar="AUTOENCODER",
        help="one of diffusers, by its name on the Hugging Face hub or its folder; module:function that returns yours; "
        "or KLAutoencoder(...), fitted to the images (default)",
    )
    encoding.add_argument(
        "--look",
        action="store_true",
        help="encode nothing: draw some images with their reconstructions and the latents' box plots, print figures",
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
    """Presets, data and options of the command line, resolved; with the name of the presets."""
    from reference_trainer.config import TrainConfig
    from reference_trainer.words import NAMES, Chosen, names_in

    named = names_in(options.words)
    if unknown := [word for word in named if word not in NAMES]:
        raise UserError(what_is(unknown[0], NAMES, [field.name for field in dataclasses.fields(TrainConfig)]))
    chosen = Chosen.of(named)
    config = chosen.configured([word for word in options.words if "=" in word], options.data)
    if not options.show and options.fields is None:
        chosen.require_data(config)
    return chosen.name, config


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

    from reference_trainer.data.classes import Classes
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
            if config.classes is not None:
                Classes.of(images)
            features = named_features(options.features, images, device)
            if ranks.leads:
                held.enter_context(run.locked())
                run.claim(config)
        beside = None if ranks.world > 1 else not options.brief
        judge = Evaluator(run, images, features, cache=cache_folder(), bounds_beside=beside)
        done = train(config, run, images, cache_folder(), device, judge, options.new_data, ranks, options.sharded)
        if not done:
            print(f"stopped and saved in {run.root}; run the same command again to continue")
            return 130
        ranks.wait()  # until the last checkpoint is there
        model = load_model(run, device)
        chosen = choose_features(features, model)
        ahead = judge.beforehand()
        evaluation = evaluate(
            model, images, chosen, bounds=not options.brief, cache=cache_folder(), ahead=ahead, ranks=ranks
        )
        if not ranks.leads:
            return 0
        print(as_table(evaluation), flush=True)  # before anything is written: a full disk shall not cost the figures
        record(run, evaluation)
        if options.brief:
            write_evaluation(run, evaluation)
        else:
            files = write_report(run, model, images, evaluation)
    if not options.brief:
        print(f"{elapsed(started)}; {look_at(files)}")
    return 0


def look_at(files: Sequence[Path]) -> str:
    """Two lines: the files, and a link to the first of them, the page that has all the others."""
    return f"look at {', '.join(map(str, files))}\nall in one page: {files[0].resolve().as_uri()}"


def named_features(name: str | None, images: ImageSet, device: torch.device) -> Features | None:
    """What ``--features`` names, loaded and tried on two images.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    from reference_trainer.evaluation.features import tried
    from reference_trainer.evaluation.named import features_named

    return None if name is None else tried(features_named(name, device), images.pixels)


def run_sample(options: argparse.Namespace) -> int:
    """One PNG of samples."""
    import torch

    from reference_trainer.averages import in_file_name, read_average
    from reference_trainer.machine import device_of
    from reference_trainer.model import load_model
    from reference_trainer.run import RunFolder

    if os.environ.get("RANK", "0") != "0":
        return 0  # one picture, drawn by one process
    if options.n < 1:
        raise UserError(f"--n must be at least 1, got {options.n}")
    average = None if options.average is None else read_average(options.average)
    model = load_model(RunFolder(options.run), device_of(options.device), average=average)
    torch.set_num_threads(model.config.threads)
    if options.guidance is not None:
        model = model.guided(options.guidance)
    rows = asked_rows(model, options.n, options.label)
    named = f"-class{rows[0][0]}" if options.label is not None else ""
    named += f"-w{options.guidance:g}" if options.guidance is not None else ""
    named += "" if average is None else f"-{in_file_name(average)}"
    file = options.out or options.run / f"samples-{options.n}-{options.evaluations}-{options.seed}{named}.png"
    require_writable(file)
    labels = torch.cat([torch.full((count,), label) for label, count in rows]) if rows else None
    pixels = model.images(options.n, model.sigmas(options.evaluations), options.seed, labels=labels)
    if len(rows) > 1 and rows[0][1] > 1:
        save_picture(in_rows(pixels, [count for _, count in rows]), file, columns=rows[0][1])
    else:
        save_picture(pixels, file)
    of = f" of {len(rows)} classes" if len(rows) > 1 else f" of class {options.label}" if rows else ""
    print(f"{options.n} images{of}, NFE {options.evaluations}{model.average and f', {model.average}'}: {file}")
    return 0


def asked_rows(model: TrainedModel, n: int, label: str | None) -> list[tuple[int, int]]:
    """Labels and how many images of each: of the class asked for, else of all; none of a run without classes.

    Raises:
        UserError: there is no such class.
    """
    if model.classes is not None:
        return [(model.classes.label(label), n)] if label is not None else model.classes.rows(n)
    if label is not None:
        raise UserError("the run was trained without classes: leave --label out, or train with classes=ByClass")
    return []


def in_rows(pixels: Tensor, counts: Sequence[int]) -> Tensor:
    """``pixels [n, ...]``, of each class so many, the first the most, with white images where a row is short."""
    import torch

    parts = pixels.split(list(counts))
    white = [part.new_full((counts[0] - len(part), *part.shape[1:]), 255) for part in parts]
    return torch.cat([part for pair in zip(parts, white, strict=True) for part in pair])


def run_evaluate(options: argparse.Namespace) -> int:
    """The table, and the report anew."""
    import torch

    from reference_trainer.averages import check_average, in_file_name, read_average
    from reference_trainer.evaluation.averages import evaluate_averages
    from reference_trainer.evaluation.evaluate import choose_features, evaluate, write_evaluation, write_report
    from reference_trainer.evaluation.table import as_table
    from reference_trainer.machine import cache_folder, device_of
    from reference_trainer.model import load_model
    from reference_trainer.ranks import Ranks, own_device
    from reference_trainer.run import RunFolder

    if options.samples < 2:
        raise UserError(f"--samples must be at least 2, got {options.samples}")
    run, device = RunFolder(options.run), own_device(device_of(options.device))
    average = None if options.average is None else read_average(options.average)
    config = run.config()
    ranks = Ranks.join(device)
    check_average(config, average)  # before the images are loaded
    torch.set_num_threads(config.threads)
    with ranks.first_leads():
        images = config.load_images(device)
        features = named_features(options.features, images, device)
        model = load_model(run, device, images, options.new_data, average)
        if options.guidance is not None:
            model = model.guided(options.guidance)
        chosen = choose_features(features, model)
    if options.averages:
        if not ranks.leads:
            return 0
        for line in evaluate_averages(run, model, images, chosen, options.seed):
            print(line, flush=True)
        return 0
    evaluation = evaluate(model, images, chosen, options.seed, n=options.samples, cache=cache_folder(), ranks=ranks)
    if not ranks.leads:
        return 0
    print(as_table(evaluation), flush=True)
    if average is not None:  # the report is of the average that samples
        print(f"wrote {write_evaluation(run, evaluation, f'evaluation-{in_file_name(average)}.json')}")
        return 0
    files = write_report(run, model, images, evaluation)
    print(look_at(files))
    return 0


def run_encode(options: argparse.Namespace) -> int:
    """A store of latents."""
    from reference_trainer.data.encode import LEFT_OUT, Encoding, encode_folder
    from reference_trainer.data.shards import DTYPES
    from reference_trainer.data.sources import source_of
    from reference_trainer.machine import cache_folder, device_of
    from reference_trainer.options import autoencoder_option, override
    from reference_trainer.presets import PRESETS, on_folder

    config = on_folder(PRESETS[0](), str(options.data))
    if options.autoencoder is not None:
        config = override(config, autoencoder_option(options.autoencoder))
    if options.out is None and not options.look:
        raise UserError("encode needs --out STORE, a folder for the latents; or --look, to see the autoencoder first")
    (dtype,) = (name for name, found in DTYPES.items() if str(found) == f"torch.{options.dtype}")
    chosen = {name: getattr(options, name) for name in ("split", "subset", "image_column", "label_column")}
    try:
        encoding = Encoding(
            source=source_of(str(options.data), options.resolution, **chosen),
            autoencoder=config.autoencoder,
            flips=options.flips,
            dtype=dtype,
            shard=options.shard,
        )
    except ValueError as error:
        raise UserError(f"encode: {error}") from error
    if options.look:
        from reference_trainer.evaluation.look import look_at

        picture = Path("runs") / f"look-{options.data.resolve().name}.png" if options.out is None else options.out
        picture = picture if picture.suffix == ".png" else picture.with_name(f"{picture.name}-look.png")
        require_writable(picture)
        print(look_at(encoding, picture, device_of(options.device), cache_folder()))
        return 0
    index = encode_folder(encoding, options.out, device_of(options.device), cache_folder())
    classes = f"{index.classes} classes" if index.classes else "no classes"
    print(
        f"{index.count} latents of {' x '.join(map(str, index.shape))} ({index.held_out} held out, {classes}) in "
        f"{len(index.shards)} shards: {options.out}"
    )
    if left_out := (index.preprocessing or {}).get("left_out"):
        print(f"{left_out} of {index.count + left_out} images are left out: {options.out / LEFT_OUT} says why")
    if (kept := (index.statistics or {}).get("covariance")) is not None:
        print(f"covariance of what is trained on: {options.out / kept['file']}, {kept['bytes'] / 1e6:.1f} MB")
    print(f"train on them: {program()} --data {shlex.quote(str(options.out))}")
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


def save_picture(pixels: Tensor, file: Path, called: Path | None = None, columns: int | None = None) -> None:
    """uint8 ``[n, ch, h, w]`` as one PNG of rows of ``columns``, None: a square; an error calls it ``called``."""
    import torch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from reference_trainer.plotting import OWN_PICTURE, tile

    columns = columns or max(1, round(len(pixels) ** 0.5))
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
