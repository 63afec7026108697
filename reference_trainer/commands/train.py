"""`train`: a run from its words to its report."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference_trainer.command import COMMANDS, did_you_mean, path
from reference_trainer.commands.shared import look_at, named_features
from reference_trainer.errors import UserError
from reference_trainer.manual import OFTEN, page

if TYPE_CHECKING:
    from reference_trainer.config import TrainConfig
    from reference_trainer.pretrained import FromDiffusers
    from reference_trainer.run import RunFolder


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`train` among the commands of the trainer."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        usage="%(prog)s [DATA] [RECIPE] [path.to.field=value ...] [options]",
        help="train, or continue, a run; then evaluate it and draw its pictures",
        description="Train a latent consistency model. The same command again continues where the last one stopped.",
        epilog=page(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fields=[often.path for often in OFTEN],
    )
    parser.add_argument(
        "words", nargs="*", default=[], metavar="WORD", help="presets of data and recipe, and path.to.field=value"
    )
    parser.add_argument(
        "--data",
        type=path,
        metavar="PATH",
        help="a folder of images, or a store of latents that encode wrote (default: the embedded digits)",
    )
    parser.add_argument(
        "--out",
        dest="run",
        type=path,
        metavar="DIR",
        help="run folder (default: runs/PRESETS or runs/PRESETS-DATA); alone, with a run's folder: continue that run",
    )
    # Its first name. torchrun takes it for one of its own options, shortened, and stops.
    parser.add_argument("--run", type=path, help=argparse.SUPPRESS)
    parser.add_argument("--features", metavar="FEATURES", help="feature network for the metrics, see evaluate")
    parser.add_argument("--brief", action="store_true", help="at the end measure the samples alone, no pictures")
    parser.add_argument("--show", action="store_true", help="print the configuration, as one can type it, and stop")
    parser.add_argument(
        "--fields", nargs="?", const="", metavar="PATH", help="print what every field (below PATH) does, and stop"
    )
    parser.add_argument(
        "--new-data",
        action="store_true",
        help="go on though the images or the pretrained autoencoder have changed: weights, fitted autoencoder and "
        "normalisation stay those of the run, the images are encoded anew",
    )
    parser.add_argument(
        "--sharded",
        action="store_true",
        help="of several processes (torchrun) each holds its share of weights, averages and moments, for networks that "
        "do not fit on one GPU; may change from start to start; not with Muon",
    )
    parser.set_defaults(run_command=run_train)
    return parser


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


def about_pretrained(config: TrainConfig) -> list[str]:
    """Where a run starts from a pretrained network: what that is, what its data are normalised by, what its norms are.

    Weights mean something for data as they were trained on alone, and nothing fails where these are others.
    """
    from reference_trainer.pretrained import FromDiffusers

    if not isinstance(config.network, FromDiffusers):
        return []
    lines, given = [config.network.in_words], config.statistics
    if given is not None:
        lines.append(f"its data are normalised by what is given: mean {given.mean}, std {given.std}, which becomes 0.5")
    else:
        lines.append(
            "its data are normalised by their own mean and std, channel by channel: if those it was trained on were "
            "normalised by others, give these, statistics='GivenStatistics(mean=(...), std=(...))', or for pixels in "
            "-1 .. 1 as they are statistics=GivenStatistics"
        )
    if config.non_scaling_norm:
        lines.append(
            "non_scaling_norm=True takes learned scales and groups out of its norms: it begins as another function; "
            "as itself with non_scaling_norm=False"
        )
    return lines


def noted_by(run: RunFolder, asked: FromDiffusers) -> FromDiffusers:
    """A pretrained network as ``run`` has found it, if it was begun with that: the folder may be gone by now."""
    noted = run.config().network if (run.root / "config.json").exists() else None
    return noted if isinstance(noted, type(asked)) and asked.is_that_of(noted) else asked.found()


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
    config = config.found(partial(noted_by, run))
    if os.environ.get("RANK", "0") == "0":
        for line in about_pretrained(config):
            print(line)
    torch.set_num_threads(config.threads)
    ranks = Ranks.join(device)
    with contextlib.ExitStack() as held:
        with ranks.first_leads():
            images = config.load_images(device)
            check_labels(config, images.train_labels)  # before the folder is claimed for what cannot be trained
            if config.classes is not None:
                Classes.of(images)
            features = named_features(options.features, images, device)
            if options.sharded:  # before the folder is claimed for it, too
                from reference_trainer.sharding import require_shardable  # slow to import

                require_shardable(config.objective, config.optimizer, config.micro_batches, ranks)
            if ranks.leads:
                held.enter_context(run.locked())
                run.claim(config)
        beside = None if ranks.world > 1 else not options.brief
        judge = Evaluator(run, images, features, cache=cache_folder(), bounds_beside=beside)
        held.callback(judge.close)
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
