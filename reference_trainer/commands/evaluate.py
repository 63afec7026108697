"""`evaluate`: a run measured."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
from typing import Any

from reference_trainer.command import path, real, whole
from reference_trainer.commands.shared import GUIDANCE, MATCH_MOMENTS, look_at, named_features
from reference_trainer.errors import UserError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`evaluate` among the commands of the trainer."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate", help="measure a run: Frechet and kernel distance, precision, recall"
    )
    parser.add_argument("run", type=path, metavar="RUN")
    parser.add_argument(
        "--features",
        metavar="FEATURES",
        help="wavelets, which need no download and see edges and texture, not what an image shows; inception (FID, "
        "KID) or dinov2 (FD-DINOv2), through torch-fidelity; a TorchScript file, .pt or .ts; or "
        "an importable module:function that returns a map from uint8 images [n, ch, h, w] to features [n, k] "
        "(default: a digit classifier for digits, wavelets for photographs, the run's own autoencoder for others)",
    )
    parser.add_argument(
        "--samples",
        type=whole,
        metavar="N",
        help="images to draw, and training images to compare them with, as far as there are so many (default 5000)",
    )
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--guidance", type=real, metavar="W", help=f"{GUIDANCE}; evaluation-wW.json")
    parser.add_argument(
        "--new-data",
        action="store_true",
        help="compare with the images that are there now, though the run was made from others",
    )
    parser.add_argument(
        "--match-moments",
        action="store_true",
        help=f"{MATCH_MOMENTS}; the map is kept with the run, for sample --match-moments; evaluation-matched.json",
    )
    weights = parser.add_mutually_exclusive_group()
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
    parser.set_defaults(run_command=run_evaluate)
    return parser


def run_evaluate(options: argparse.Namespace) -> int:
    """The table, and the report anew."""
    import torch

    from reference_trainer.averages import check_average, in_file_name, read_average
    from reference_trainer.data.origin import kept_shape
    from reference_trainer.evaluation.averages import evaluate_averages
    from reference_trainer.evaluation.evaluate import choose_features, evaluate, write_evaluation, write_report
    from reference_trainer.evaluation.table import as_table
    from reference_trainer.evaluation.training_set import MAX_IMAGES
    from reference_trainer.machine import cache_folder, device_of
    from reference_trainer.matching import matched, require_matchable, require_small, save_moments, with_kept_moments
    from reference_trainer.model import load_model, with_guidance
    from reference_trainer.ranks import Ranks, own_device
    from reference_trainer.run import RunFolder
    from reference_trainer.training.start import latents_of_run

    if options.samples is not None and options.samples < 2:
        raise UserError(f"--samples must be at least 2, got {options.samples}")
    if options.samples is not None and options.averages:
        raise UserError("--averages compares 5000 samples of each: leave out --samples")
    if options.match_moments and options.averages:
        raise UserError("--match-moments is for one average: leave out --averages, or name one with --average")
    if options.match_moments and options.new_data:
        raise UserError("--match-moments takes the moments of what the run was made from: leave out --new-data")
    run, device = RunFolder(options.run), own_device(device_of(options.device))
    average = None if options.average is None else read_average(options.average)
    config = run.config()
    ranks = Ranks.join(device)
    check_average(config, average)  # all before the images are loaded
    run.require_checkpoint()
    if options.guidance is not None:
        with_guidance(config, options.guidance)
    if options.match_moments:
        require_small(kept_shape(run.space_file))
    torch.set_num_threads(config.threads)
    with ranks.first_leads():
        images = config.load_images(device)
        features = named_features(options.features, images, device)
        model = load_model(run, device, images, options.new_data, average)
        if options.guidance is not None:
            model = model.guided(options.guidance)
        if options.match_moments and ranks.leads:
            require_matchable(model, images.num_train)
            latents, _ = latents_of_run(config, run, images, cache_folder(), device)
            model = matched(model, latents)
            save_moments(run, model)
        elif options.match_moments:
            model = with_kept_moments(run, model)
        chosen = choose_features(features, model)
    if options.averages:
        if not ranks.leads:
            return 0
        for line in evaluate_averages(run, model, images, chosen, options.seed):
            print(line, flush=True)
        return 0
    n = options.samples or MAX_IMAGES
    evaluation = evaluate(model, images, chosen, options.seed, n=n, cache=cache_folder(), ranks=ranks)
    if not ranks.leads:
        return 0
    print(as_table(evaluation), flush=True)
    named = "" if average is None else f"-{in_file_name(average)}"
    named += "" if options.guidance is None else f"-w{options.guidance:g}"
    named += "-matched" if options.match_moments else ""
    if named:  # the report is of what samples by default
        print(f"wrote {write_evaluation(run, evaluation, f'evaluation{named}.json')}")
        return 0
    files = write_report(run, model, images, evaluation)
    print(look_at(files))
    return 0
