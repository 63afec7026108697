"""Which choices make the digits recipe good? Each arm changes one thing of the preset `digits`; paired seeds.

`python benchmarks/recipe.py [--steps 1500] [--seeds 0 1] [--out FILE]`: every arm is a run of the reference trainer
in a process of its own with one thread, two at a time; what was run before is not run again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _timing import machine
from tqdm import tqdm

ARMS: dict[str, list[str]] = {
    "the preset digits": [],
    "no coupling": ["objective.coupler=independent"],
    "coupled at every level": ["objective.couple_above=0"],
    "coupled above sigma 3": ["objective.couple_above=3"],
    "Pseudo-Huber": ["objective.distance=pseudo_huber"],
    "Geman-McClure": ["objective.distance=geman_mcclure"],
    "squared l2": ["objective.distance=squared_l2"],
    "iCT's constant c": ["objective.c=ConstantC"],
    "the authors' c": ["objective.c=PowerLawC"],
    "early diffusion loss, mean": ["objective.extra=EarlyDiffusion"],
    "NsLN": ["non_scaling_norm=True"],
    "4 latent channels": ["autoencoder.latent_channels=4"],
    "squared error in the autoencoder": ["autoencoder.likelihood=gaussian"],
    "UNet2DModel": ["network=UNet(block_out_channels=(64, 64))"],
    "no decay of the learning rate": ["learning_rate=ConstantLR(lr=1e-3)"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--preset", default="digits", help="what the arms change")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]

    def run(job: tuple[str, int]) -> dict[str, Any]:
        arm, seed = job
        folder = options.out / f"{options.preset}-{arm.replace(' ', '-').replace(',', '')}-{options.steps}-{seed}"
        if not (folder / "evaluation.json").exists():
            command = [sys.executable, "-m", "reference_trainer", "train", options.preset, *ARMS[arm]]
            command += [f"steps={options.steps}", f"seed={seed}", f"save_every={options.steps}", f"--run={folder}"]
            ran = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if ran.returncode:
                raise RuntimeError(f"{arm}, seed {seed}: {ran.stderr.strip().splitlines()[-1]}")
        rows: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())["rows"]
        return rows

    with ThreadPoolExecutor(options.workers) as pool:
        results = list(tqdm(pool.map(run, jobs), total=len(jobs), desc="runs", unit="run"))
    by_arm = {arm: [r for (a, _), r in zip(jobs, results, strict=True) if a == arm] for arm in options.arms}
    print(f"\n{options.steps} steps, seeds {options.seeds}, preset {options.preset}; {json.dumps(machine())}\n")
    print("| arm | Frechet, 1 evaluation | 2 evaluations | p >= 0.9 | precision | recall |")
    print("|---|---|---|---|---|---|")
    for arm, rows in by_arm.items():
        one, two = ([row[name] for row in rows] for name in ("1 evaluation", "2 evaluations"))
        cells = [spread(one, "frechet", 1), spread(two, "frechet", 1)]
        cells += [spread(one, name, 2) for name in ("sure_digits", "precision", "recall")]
        print(f"| {arm} | {' | '.join(cells)} |")
    return 0


def spread(rows: list[dict[str, float]], name: str, digits: int) -> str:
    """Mean and, behind it, each seed's value."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return "-"
    return f"{statistics.mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})"


if __name__ == "__main__":
    sys.exit(main())
