"""`encode`: images into a store of latents, or the autoencoder looked at."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from reference_trainer.command import path, program, whole
from reference_trainer.commands.shared import require_writable
from reference_trainer.errors import UserError
from reference_trainer.manual import ENCODE_EXAMPLES


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`encode` among the commands of the trainer."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "encode",
        help="encode images into a store of latents to train on",
        description="Started several times, or by torchrun, the processes share the work. Whoever was interrupted: the "
        "same command again goes on at the next shard.",
        epilog=ENCODE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data",
        type=path,
        metavar="DATA",
        help="a folder of images or a zip of one, with labels from its class folders or from EDM's dataset.json; or a "
        "Hugging Face dataset: its folder, or its name on the hub",
    )
    parser.add_argument("--split", metavar="NAME", help="read this one, of folders or splits such as train and val")
    parser.add_argument("--subset", metavar="NAME", help="of a Hugging Face dataset: its configuration")
    parser.add_argument("--image-column", metavar="NAME", help="of a Hugging Face dataset with several of images")
    parser.add_argument("--label-column", metavar="NAME", help="of a Hugging Face dataset with several of classes")
    parser.add_argument("--out", type=path, metavar="STORE", help="folder for the latents")
    parser.add_argument(
        "--autoencoder",
        metavar="AUTOENCODER",
        help="one of diffusers, by its name on the Hugging Face hub or its folder; module:function that returns yours; "
        "KLAutoencoder(...), fitted to the images; or a field of the one that is fitted by default, as in steps=1100",
    )
    parser.add_argument(
        "--look",
        action="store_true",
        help="encode nothing: draw some images with their reconstructions and the latents' box plots, print figures",
    )
    parser.add_argument("--resolution", type=whole, default=64, help="side in pixels (default 64)")
    parser.add_argument("--flips", action="store_true", help="also encode the mirrored images")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--shard", type=whole, default=4096, help="images a file (default 4096)")
    parser.set_defaults(run_command=run_encode)
    return parser


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
