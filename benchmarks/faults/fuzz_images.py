"""Is there an image file that ends the reading of a folder, holds it up or eats the memory?

    python benchmarks/faults/fuzz_images.py [--minutes 2] [--seed 0] [--keep DIR]

Small valid files of every format and mode that Pillow writes are cut, and bytes of them changed, put in and taken out.
A process of its own reads each folder of them with ``ImageFolder``: it may skip what it likes, but must return or say
a ``UserError``, within a minute and 6 GiB. A row a format; exit status 1, and the files in DIR, if one broke the rule.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import resource
import runpy
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "needed.py"))

import numpy as np
from PIL import Image

from reference_trainer.data.images import ImageFolder
from reference_trainer.data.squares import extensions, formats
from reference_trainer.errors import UserError

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB")
VARIANTS: dict[str, tuple[dict[str, object], ...]] = {
    "TIFF": ({"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_adobe_deflate"}),
    "DDS": ({"pixel_format": "DXT1"}, {"pixel_format": "DXT5"}, {"pixel_format": "BC5"}),
    "BLP": ({"blp_version": "BLP1"},),
    "TGA": ({"compression": "tga_rle"},),
    "JPEG": ({"progressive": True},),
    "WEBP": ({"lossless": True},),
    "ICO": ({"bitmap_format": "bmp"},),
}
LEFT_OUT = {"SPIDER", "ICNS"}
"""SPIDER holds floats only; ICNS is written at all sizes up to 1024, which takes a second (see below)."""
FAST: dict[str, dict[str, object]] = {"AVIF": {"speed": 10}, "ICO": {"sizes": [(16, 16)]}}
ANIMATED = ("GIF", "PNG", "TIFF", "WEBP", "AVIF")
FILES, SECONDS = 40, 60  # a folder; and how long it may take to read it
MOST_GIB = 6.0
"""Of memory: the largest image that Pillow opens, of 179 million pixels, as RGBA, eight times and a little more."""


@cache
def samples() -> dict[str, bytes]:
    """A small valid file for every format, mode and variant that can be written and read here, by its name."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    about = Image.Exif()
    about[0x0112], about[0x010F] = 6, "maker"
    found = {}
    for kind in sorted(set(formats()) & Image.SAVE.keys() - LEFT_OUT):
        extension = next(e for e, name in Image.registered_extensions().items() if name == kind)
        trials: list[tuple[str, Image.Image, dict[str, object]]] = [(mode, in_mode(colour, mode), {}) for mode in MODES]
        trials += [(f"variant{i}", colour, options) for i, options in enumerate(VARIANTS.get(kind, ()))]
        trials.append(("exif", colour, {"exif": about}))
        if kind in ANIMATED:
            trials.append(("frames", colour, {"save_all": True, "append_images": [in_mode(colour, "L")]}))
        for name, image, options in trials:
            with suppress(Exception), warnings.catch_warnings():  # most formats have few modes
                warnings.simplefilter("ignore")
                written = io.BytesIO()
                image.save(written, kind, **FAST.get(kind, {}), **options)
                found[f"{kind}-{name.replace(';', '')}{extension}"] = written.getvalue()
    icon = found["PNG-RGB.png"]
    found["ICNS-RGB.icns"] = b"icns" + (16 + len(icon)).to_bytes(4) + b"icp4" + (8 + len(icon)).to_bytes(4) + icon
    return found


def in_mode(colour: Image.Image, mode: str) -> Image.Image:
    """``colour``, in ``mode``; where Pillow has no conversion, a plain picture."""
    if mode == "I;16":
        return Image.fromarray(np.asarray(colour.convert("L"), dtype=np.uint16) * 257)
    try:
        return colour.convert(mode)
    except ValueError:
        return Image.new(mode, colour.size)


Change = tuple[str, float, bytes]
"""What is done ("set", "insert", "drop", "cut"), where (a share of the length), with which bytes."""

ACTIONS = ("set", "insert", "drop", "cut")


def damaged(content: bytes, changes: Sequence[Change]) -> bytes:
    """``content`` after ``changes``, one after the other."""
    for action, where, new in changes:
        at = int(where * len(content))
        if action == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif action == "insert":
            content = content[:at] + new + content[at:]
        elif action == "drop":
            content = content[:at] + content[at + len(new) :]
        else:
            content = content[:at]
    return content


def with_checksums(content: bytes) -> bytes:
    """A damaged PNG with the checksums of its chunks made right: by them alone nearly every change would be seen."""
    out, at = bytearray(content), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4])
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4) if end + 4 <= len(out) else out[end : end + 4]
        at = end + 4
    return bytes(out)


def random_changes(rng: np.random.Generator) -> list[Change]:
    """One to four changes, half of them in the first tenth, where the header is; cutting is rare."""
    changes = []
    for _ in range(rng.integers(1, 5)):
        action = str(rng.choice(ACTIONS, p=(0.7, 0.12, 0.12, 0.06)))
        where = float(rng.random() * rng.choice((0.1, 1.0)))
        new = bytes(rng.integers(0, 256, rng.integers(1, 5), dtype=np.uint8))
        changes.append((action, where, bytes(len(new)) if rng.random() < 0.1 else new))
    return changes


@dataclass(frozen=True)
class Outcome:
    """Of reading one folder."""

    fault: str
    """Empty: it returned, or said a ``UserError``."""
    read: int
    seconds: float
    peak_gib: float


def read_folder(folder: Path, answer: Connection) -> None:
    """In a process of its own: a decoder may kill it."""
    started, fault, read = time.monotonic(), "", 0
    with redirect_stdout(io.StringIO()):
        try:
            read = len(ImageFolder(path=str(folder), resolution=8, held_out_every=2).load().pixels)
        except UserError as error:
            fault = "more than one line" if len(str(error).splitlines()) != 1 else ""
        except BaseException as error:
            fault = repr(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if not fault and peak > MOST_GIB:
        fault = f"{peak:.1f} GiB of memory"
    answer.send(Outcome(fault, read, time.monotonic() - started, peak))


def outcome_of(folder: Path) -> Outcome:
    """``read_folder``, whatever becomes of its process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=read_folder, args=(folder, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        return Outcome(f"not read within {SECONDS} s", 0, SECONDS, 0)
    except EOFError:
        process.join()
        return Outcome(f"the process died ({process.exitcode})", 0, 0, 0)
    finally:
        process.kill()
        process.join()


def write_folder(folder: Path, name: str, content: bytes, rng: np.random.Generator) -> None:
    """``FILES`` damaged versions of one sample."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i in range(FILES):
        changed = damaged(content, random_changes(rng))
        (folder / f"{i:02}-{name}").write_bytes(with_checksums(changed) if name.startswith("PNG") else changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="for files at fault (default %(default)s)")
    options = parser.parse_args()
    rng, content = np.random.default_rng(options.seed), samples()
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    end, faults = time.monotonic() + 60 * options.minutes, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        while time.monotonic() < end:
            for name in content:
                if time.monotonic() > end:
                    break
                write_folder(folder, name, content[name], rng)
                outcome = outcome_of(folder)
                outcomes[name.partition("-")[0]].append(outcome)
                if outcome.fault:
                    kept = options.keep / f"{faults:03}-{name}"
                    shutil.copytree(folder, kept, dirs_exist_ok=True)
                    faults += 1
                    print(f"{name}: {outcome.fault}; see {kept}")
    print(f"{'':10}{'files':>8}{'still read':>12}{'faults':>8}{'slowest folder, s':>19}{'most memory, GiB':>18}")
    for kind, rows in sorted(outcomes.items()):
        print(
            f"{kind:10}{FILES * len(rows):8}{sum(row.read for row in rows):12}{sum(bool(row.fault) for row in rows):8}"
            f"{max(row.seconds for row in rows):19.2f}{max(row.peak_gib for row in rows):18.2f}"
        )
    return int(faults > 0)


if __name__ == "__main__":
    assert extensions()  # all plugins are loaded once, not in every process
    sys.exit(main())
