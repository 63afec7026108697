"""Does this working tree compute the same losses as the commit REV, to the last bit?

    python benchmarks/same_losses.py REV [--steps 30] [--only digits paper]

Every preset, and the default one on a folder of images made here, is trained for a few dozen steps, once in a worktree
of REV and once in the working tree, by the command line, each with a cache of its own. Compared are the rows of
metrics.jsonl and evaluations.jsonl and the tensors of the last checkpoint and of the codec; but no figure of an
evaluation that only one of the two measures. Prints one line a case, and the first difference of each file by name;
exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.presets import PRESETS

ROOT = Path(__file__).parents[1]
BRIEF_FIT = "autoencoder.steps=30"
CASES: dict[str, list[str]] = {
    preset.__name__: [preset.__name__, *([BRIEF_FIT] if isinstance(preset().autoencoder, KLAutoencoder) else [])]
    for preset in PRESETS
} | {"folder": [PRESETS[0].__name__, BRIEF_FIT, "batch_size=32", "--data={images}"]}
NOT_COMPARED = {"seconds", "code"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", metavar="REV", help="commit to compare with")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    options = parser.parse_args()
    found = False
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_images(scratch / "images")
        then = scratch / "then"
        git("worktree", "add", "--detach", "--quiet", str(then), options.rev)
        try:
            for case in tqdm(options.only, desc="cases", unit="case", leave=False):
                words = [word.format(images=scratch / "images") for word in CASES[case]]
                runs = [
                    train(tree, words, scratch / f"{case}-{name}", options.steps)
                    for name, tree in (("then", then), ("now", ROOT))
                ]
                differing = list(differences(*runs))
                found |= bool(differing)
                tqdm.write(f"{case:15} {'; '.join(differing) if differing else f'{options.steps} steps: equal'}")
        finally:
            git("worktree", "remove", "--force", str(then))
    print(f"working tree against {options.rev}: {'DIFFERENT' if found else 'equal to the last bit'}")
    return int(found)


def git(*words: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *words], check=True)


def train(tree: Path, words: list[str], out: Path, steps: int) -> Path:
    """The run folder of ``words``, trained by the code in ``tree``."""
    # The cache differs: what the one fitted would otherwise be what the other loads.
    environment = os.environ | {"PYTHONPATH": str(tree), "ROBUSTCM_CACHE": str(out / "cache")}
    run = out / "run"
    words = [*words[:1], f"steps={steps}", "log_every=1", *words[1:], "--brief", "--device=cpu", f"--run={run}"]
    command = [sys.executable, "-m", "reference_trainer", "train", *words]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree}:\n{ran.stderr[-2000:]}")
    return run


def differences(then: Path, now: Path) -> Iterator[str]:
    """The first difference of each file of two runs, in words."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [list(map(json.loads, (run / name).read_text().splitlines())) for run in (then, now)]
        for old, new in zip_longest(*rows, fillvalue={}):
            if name == "evaluations.jsonl":
                old, new = in_both(old, new), in_both(new, old)
            if path := first_difference(old, new):
                yield f"{name}, step {(old or new).get('step')}: {path}"
                break
    for name in ("autoencoder.safetensors", f"checkpoints/{newest(now)}"):
        old, new = ({k: v.numpy(force=True) for k, v in load_file(run / name).items()} for run in (then, now))
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                yield f"{name}: {key} only {'then' if key in old else 'now'}"
                break
            if old[key].shape != new[key].shape:
                yield f"{name}: {key} has the shape {new[key].shape}, then {old[key].shape}"
                break
            if not same_bits(old[key], new[key]):
                yield f"{name}: {key} differs by up to {np.abs(old[key].astype(float) - new[key]).max():.3g}"
                break


def in_both(value: Any, other: Any) -> Any:
    """``value`` without the keys, at any depth, that ``other`` does not have."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return value
    return {key: in_both(item, other[key]) for key, item in value.items() if key in other}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def newest(run: Path) -> str:
    return max(file.name for file in (run / "checkpoints").iterdir())


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """Where two JSON values differ, as ``path: old -> new``; empty where they do not.

    Floats survive JSON exactly. As text 0.0 is not -0.0, and 1 is neither 1.0 nor true.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted((old.keys() | new.keys()) - NOT_COMPARED):
            if found := first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key):
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if found := first_difference(a, b, f"{path}[{i}]"):
                return found
        return ""
    return "" if json.dumps(old) == json.dumps(new) else f"{path}: {old} -> {new}"


def make_images(folder: Path) -> None:
    """Colour PNGs of blurred noise; enough for a batch."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(80, 3, 12, 12, generator=generator)
    pictures = torch.nn.functional.interpolate(noise, (70, 90), mode="bicubic").clamp(0, 1)
    for i, picture in enumerate(pictures):
        Image.fromarray((255 * picture).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")


if __name__ == "__main__":
    sys.exit(main())
