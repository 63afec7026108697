"""The page that `train --help` shows. Made of text alone: importing the trainer takes longer than reading it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple


class Often(NamedTuple):
    """A field people change."""

    path: str
    default: str
    """As typed; tests check it against the configuration."""
    what: str


OFTEN = (
    Often("steps", "4000", "training steps; a finished run stays as it is"),
    Often("batch_size", "256", "samples a step (64 with --data, but for published presets)"),
    Often("seed", "0", "of weights, noise and order"),
    Often("learning_rate.lr", "0.003", "peak of the learning rate; learning_rate=ConstantLR(lr=1e-4) is the paper's"),
    Often("optimizer", "Adam()", "how gradients become steps (Muon() with --data, but for published presets)"),
    Often("network.width", "128", "of the transformer; network=UNet(...) for a U-Net"),
    Often("network.patch", "4", "side of a token (2 with --data, but for published presets)"),
    Often("statistics", "None", "GivenStatistics(...) normalises latents by these, for network=FromDiffusers(...)"),
    Often("autoencoder.latent_channels", "2", "of the autoencoder fitted here (4 with --data)"),
    Often("autoencoder.steps", "1100", "of its fit; None (with --data): until its held-out PSNR no longer rises"),
    Often("objective.distance", "geman_mcclure", "cauchy, pseudo_huber, squared_l2, PerToken(...), PerElement(...)"),
    Often(
        "objective.c.multiple",
        "0.7",
        "of the median residual (2.0 with --data, but for published presets); c=ConstantC",
    ),
    Often("objective.coupler", "exact", "pairing of noise and data; independent, Entropic(reg=...)"),
    Often("objective.gate", "AboveExplained(0.2)", "where the pairing is used; Above(3), everywhere"),
    Often("objective.teacher_input", "KeepCovariance()", "keeps the variance of the data from level to level; None"),
    Often("classes", "None", "ByClass trains by class, of class folders or a store with labels: sample --label"),
    Often("clip.k", "4.0", "where outlying latents are cut (TukeyClip, 3.0, with --data); clip=None: nowhere"),
    Often("non_scaling_norm", "False", "norms without a learned scale"),
    Often("evaluate_every", "0", "steps between two looks at the samples; 0: only at the end"),
    Often("averages", "()", "more averages of the weights: Exponential(0.999), PowerFunction(sigma_rel=0.1)"),
    Often("threads", "1", "of the CPU"),
    Often("computing.precision", "auto", "bfloat16 on a GPU that has it, else float32; tf32, bfloat16, float32"),
)
"""With the defaults of the first preset."""

EXAMPLES = """\
  python -m reference_trainer ilct steps=1000 --out runs/brief
  python -m reference_trainer paper objective.gate='Above(3)' objective.c='MeasuredC(multiple=0.5)'
  python -m reference_trainer --data photos data.resolution=128 autoencoder.latent_channels=8
  python -m reference_trainer --data photos autoencoder="DiffusersAutoencoder(name='path/to/vae')" --out runs/sd
  python -m reference_trainer --data photos autoencoder="PretrainedAutoencoder(load='my_vae:load')" --out runs/mine
  python -m reference_trainer --data photos network="FromDiffusers(name='path/to/it')" --out runs/tuned
  python -m reference_trainer celebahq paper network=DIT_B2 --show
  python -m reference_trainer train --fields objective.c     what there is to choose, with every number
  python -m reference_trainer --out runs/photos              go on with a run as it is configured"""


ENCODE_EXAMPLES = """\
examples:
  python -m reference_trainer encode photos --look --autoencoder stabilityai/sd-vae-ft-ema     see it before you pay
  python -m reference_trainer encode photos --out latents --autoencoder stabilityai/sd-vae-ft-ema
  python -m reference_trainer encode photos --out latents --autoencoder path/to/folder         without network
  python -m reference_trainer encode photos --out latents \\
      --autoencoder "DiffusersAutoencoder(name='path/to/pipeline', subfolder='vae', dtype='bfloat16', latents='sample')"
  python -m reference_trainer --data latents                                                   train on it"""


def presets(module: str, argument: str | None = None) -> list[tuple[str, str]]:
    """Name and first line of each preset in ``module``, read from the source.

    These are its functions that take nothing, or ``argument`` alone and that with a default.
    """
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    functions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and [given.arg for given in (*node.args.args, *node.args.kwonlyargs)] == ([argument] if argument else [])
        and len(node.args.defaults) == len(node.args.args)
    ]
    return [(function.name, (ast.get_docstring(function) or "").partition("\n")[0]) for function in functions]


def page() -> str:
    """What stands below the options of `train --help`."""
    lines = ["presets of data, by our recipe (the first is the default; the last four want --data STORE):"]
    lines += [f"  {name:15} {line}" for name, line in (*presets("presets"), *presets("published", "images"))]
    lines += ["recipes, alone or beside one of these:"]
    lines += [f"  {name:15} {line}" for name, line in presets("presets", "config")]
    lines += ["", "fields people change, with their defaults (train --fields shows all of them):"]
    for often in OFTEN:
        lines.append(f"  {f'{often.path}={often.default}':36} {often.what}")
    return "\n".join([*lines, "", "examples:", EXAMPLES])
