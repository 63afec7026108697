"""How a figure was measured: what it is of, what it was compared with, in which features, by which code.

Two figures compare if their manifests are alike. Names are for people; digests tell.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from reference_trainer.errors import UserError
from reference_trainer.evaluation.features import Features, identity_of, scales_kernel
from reference_trainer.evaluation.training_set import TrainingSet
from reference_trainer.model import TrainedModel
from robustcm import __version__

Manifest = dict[str, Any]
UNKNOWN = "none stated"
NAMES = ("reference.name", "features.name")
"""What may differ between figures that compare: a folder that was moved, a file that was renamed."""


def manifest_of(model: TrainedModel, train: TrainingSet, features: Features) -> Manifest:
    """Of all figures of one evaluation; each row adds its own n, and "samples" says how many evaluations (NFE) it took.

    ``samples.seed`` also orders the training images. Without features that can be computed their digest is null.
    """
    try:
        identity = identity_of(features, train.first.shape[1:])
        digest, resize = identity.digest, identity.resize
    except UserError:  # the rows say why
        digest, resize = None, None
    return {
        "reference": {"name": train.images.name, "fingerprint": train.images.fingerprint(), "n": train.count},
        "features": {
            "name": features.name,
            "digest": digest,
            "resize": resize,
            "kernel": "scaled by the reference's root mean square" if scales_kernel(features) else "unscaled",
        },
        "samples": {
            "n": train.count,
            "seed": train.seed,
            "nfe": [1, 2],
            "average": model.average or f"EMA, decay {model.config.ema_decay:g}",
            **({} if model.config.classes is None else {"guidance": model.config.classes.guidance}),
            **({} if model.moments is None else {"matched": True}),  # else left out, as earlier versions do
        },
        "code": code_version(),
        "device": model.device.type,
    }


def unlike(manifests: Mapping[str, Manifest | None]) -> list[str]:
    """In what the manifests of figures that share a table differ, one line a field, each value with those that have it.

    Args:
        manifests: by the name of what was measured; None: made by a version without. If all are, nothing is said.
    """
    stated = {name: dict(leaves(manifest)) for name, manifest in manifests.items() if manifest}
    if not stated:
        return []
    silent = [name for name, manifest in manifests.items() if not manifest]
    lines = [f"no manifest: {_some(silent)}"] if silent else []
    for field in dict.fromkeys(field for fields in stated.values() for field in fields):
        values: dict[str, list[str]] = {}
        for name, fields in stated.items():
            values.setdefault(str(fields.get(field, UNKNOWN)), []).append(name)
        if len(values) > 1 and field not in NAMES:
            lines.append(f"{field}: " + "; ".join(f"{value} ({_some(names)})" for value, names in values.items()))
    return lines


def in_words(manifest: Manifest) -> str:
    """A manifest in a line."""
    reference, features, samples = manifest["reference"], manifest["features"], manifest["samples"]
    how = f", guidance {samples['guidance']:g}" if "guidance" in samples else ""
    how += ", moved to the moments of the data" if samples.get("matched") else ""
    return (
        f"reference {reference['fingerprint']}, n {reference['n']}; features {features['digest']}, resize: "
        f"{features['resize']}, kernel {features['kernel']}; samples {samples['n']}, seed {samples['seed']}, "
        f"{samples['average']}{how}; version {manifest['code']}, {manifest['device']}"
    )


@cache
def code_version() -> str:
    """The version, and of a checkout the commit; with "-dirty" where files have changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: a repository further up is another's
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or one that does not trust the folder
        return __version__
    return f"{__version__} at {commit}"


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested mappings, each with its path: ``a.b``."""
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from leaves(value, where)
        else:
            yield where, value


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
