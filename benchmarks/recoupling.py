"""Does it help the second evaluation to pair its noise with the first estimate, as f saw noise and data paired?

    python benchmarks/recoupling.py RUN [RUN ...] [--n 5000]

The runs were trained with a coupler; the samples are drawn 250 at a time. Frechet distance, in the features that
`evaluate` takes, of one evaluation, of two as the sampler has them, and of two with the fresh noise paired exactly with
the first estimates of its 250; the last also with pairs drawn at the level where the gate begins.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import write_json
from torch import Tensor
from tqdm import tqdm

from reference_trainer.evaluation.evaluate import choose_features, training_images
from reference_trainer.evaluation.metrics import frechet_distance
from reference_trainer.machine import describe_machine
from reference_trainer.model import TrainedModel, load_model
from reference_trainer.run import RunFolder
from robustcm.consistency import sample
from robustcm.couplers import Coupler, exact
from robustcm.gates import AboveExplained
from robustcm.randomness import Stream, step_generator

BATCH = 250


def images_of(model: TrainedModel, n: int, sigmas: tuple[float, ...], coupler: Coupler | None) -> Tensor:
    """uint8 ``[n, ch, h, w]``, from the noise ``TrainedModel.images`` has at seed 0."""
    f, parts = model.function, []
    for index, start in enumerate(range(0, n, BATCH)):
        generator = step_generator(0, index, Stream.SAMPLING)
        z = torch.randn(BATCH, *model.shape, generator=generator)[: n - start].to(model.device)
        parts.append(sample(f, z, sigmas=sigmas, generator=generator, coupler=coupler).cpu())
    return model.space.decode(torch.cat(parts).to(model.device))


def rows_of(model: TrainedModel, n: int) -> dict[str, float]:
    """Frechet distance by way of sampling."""
    images = model.config.data.load()
    features = choose_features(None, model)
    real = features(training_images(images, seed=0)[:n])
    config, gate = model.config, model.config.objective.gate
    level = config.objective.levels.nearest
    ways: dict[str, tuple[tuple[float, ...], Coupler | None]] = {
        "1 evaluation": (model.sigmas(1), None),
        "2 evaluations": (model.sigmas(2), None),
        "2, re-coupled": (model.sigmas(2), exact),
    }
    if isinstance(gate, AboveExplained):
        at = level(gate.on(model.latents_of(images.train)).sigma, model.step - 1, config.steps)
        above = (*model.sigmas(1), at)
        ways |= {f"2, at the gate, {at:.3g}": (above, None), f"2, at the gate, {at:.3g}, re-coupled": (above, exact)}
    bar = tqdm(ways.items(), leave=False)
    return {name: frechet_distance(real, features(images_of(model, len(real), *way))) for name, way in bar}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--n", type=int, default=5000, help="samples, at most (default 5000)")
    options = parser.parse_args()
    about, rows = describe_machine(), []
    for run in options.runs:
        model = load_model(RunFolder(run), torch.device("cpu"))
        torch.set_num_threads(model.config.threads)
        rows.append({"run": str(run), "frechet": rows_of(model, options.n)})
        print(run, ", ".join(f"{name}: {value:.4g}" for name, value in rows[-1]["frechet"].items()), flush=True)
    print(f"wrote {write_json('recoupling', rows, about).name}")


if __name__ == "__main__":
    main()
