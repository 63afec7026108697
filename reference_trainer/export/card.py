"""The README.md of an exported folder: what the model is, how to open it, what it was made from, how good it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from reference_trainer.averages import in_file_name
from reference_trainer.config import TrainConfig
from reference_trainer.errors import UserError, printable
from reference_trainer.evaluation.manifest import code_version
from reference_trainer.evaluation.table import as_table
from reference_trainer.export.folder import Exported
from reference_trainer.files import as_json, load_tensors
from reference_trainer.model import TrainedModel
from reference_trainer.options import as_options, to_json
from reference_trainer.run import RunFolder
from robustcm.averages import Average
from robustcm.flow_maps import FlowMapObjective

CARD = "README.md"
PICTURE = "samples.png"
RECIPE = "recipe.json"
PAGE = Template("""\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- robustcm
- $tag
---

# $title

$what, trained for $steps steps with robustcm $version. Say here under which licence it may be used: `license:` above.

## Use

```python
import torch
from diffusers import DiffusionPipeline

folder = "."  # this folder, or its name on the hub
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)  # few_step_pipeline.py, which lies here
images = pipe(batch_size=4, num_inference_steps=2, generator=torch.Generator().manual_seed(0)$images
```

$levels$about_classes$left_out

$picture## Made from

$origin

$recipe

## Measured

$measured
""")


def card(
    model: TrainedModel, exported: Exported, run: RunFolder, name: str, average: Average | None, drawn: bool
) -> str:
    """The text of the card.

    Args:
        name: of the model.
        average: of the weights that were asked for.
        drawn: whether there is a picture.
    """
    is_flow_map = isinstance(model.config.objective, FlowMapObjective)
    by_class = model.classes is not None
    return PAGE.substitute(
        tag="flow-map" if is_flow_map else "consistency-model",
        title=printable(name),
        what=f"A {'flow map' if is_flow_map else 'consistency model'} of {' x '.join(map(str, model.shape))} "
        f"{'pixels' if exported.pipeline.config['pixels'] else 'latents'}{' by class' if by_class else ''}",
        steps=model.step,
        version=code_version(),
        images=").images" if not exported.left_out else ', output_type="latent").images',
        levels=_levels(exported.sigmas, "flow times" if is_flow_map else "noise levels"),
        about_classes=_about_classes(model),
        left_out=f"\n\nThe {exported.left_out}." if exported.left_out else "",
        picture=f"![samples of one evaluation above, of two below]({PICTURE})\n\n" if drawn else "",
        origin=_origin(run),
        recipe=_recipe(model.config),
        measured=_measured(model, run, average),
    )


def _levels(sigmas: Sequence[Sequence[float]], called: str) -> str:
    shown = [f"{len(levels)}: {', '.join(f'{level:.4g}' for level in levels)}" for levels in sigmas]
    return f"`num_inference_steps` and the {called} it evaluates at: {'; '.join(shown)}."


def _about_classes(model: TrainedModel) -> str:
    if model.classes is None or model.config.classes is None:
        return ""
    return (
        f" `class_labels=[...]` asks for classes 0 to {len(model.classes.names) - 1}, whose names are `id2label` in "
        "model_index.json; without it they are drawn as often as they were trained on (`class_counts`); "
        f"`guidance_scale` is {model.config.classes.guidance:g} unless given."
    )


def _origin(run: RunFolder) -> str:
    """Of the images, from the run's autoencoder.safetensors."""
    origin = load_tensors(run.space_file)[1].get("origin")
    if not origin:
        return "The run does not say: it is of an earlier version."
    size = " x ".join(map(str, origin["size"]))
    notes = "".join(f"; {name} {value}" for name, value in origin["notes"].items() if name == "weights_sha256")
    return (
        f"{origin['train']} training images ({origin['held_out']} more held out) of {size}, fingerprint "
        f"{origin['fingerprint']}{notes}. Latents are normalised per channel: `latents_mean` and `latents_std` in "
        "model_index.json."
    )


def recipe(config: TrainConfig) -> bytes:
    """``RECIPE``: all of the configuration."""
    return (_shortened(as_json(to_json(config), indent=1)) + "\n").encode()


def _recipe(config: TrainConfig) -> str:
    whole, usual = as_options(config), as_options(TrainConfig())
    other = [_shortened(option) for option in whole if option not in usual]
    said = f"The recipe, paths shortened, is in [{RECIPE}]({RECIPE})"
    if not other:
        return f"{said}: that of `python -m reference_trainer`."
    return f"{said}. What differs from `python -m reference_trainer`:\n\n```\n" + "\n".join(other) + "\n```"


def _shortened(text: str) -> str:
    """Without the folders that a path lies in: they are nobody's business."""
    return re.sub(r"(^|[='\"])~?/(?:[^/'\"]*/)*([^/'\"]+)", r"\1\2", text)


def _measured(model: TrainedModel, run: RunFolder, average: Average | None) -> str:
    """The run's evaluation of these weights, with its manifest; or that there is none."""
    classes = model.config.classes
    named = "evaluation" if average is None else f"evaluation-{in_file_name(average)}"
    asked = [] if classes is None else [f"{named}-w{classes.guidance:g}"]  # evaluate --guidance
    file = next(file for name in (*asked, named) if (file := run.root / f"{name}.json").exists() or name == named)
    evaluation = _read(file)
    if not evaluation or evaluation.get("step") != model.step:
        return "These weights were not evaluated before the export."
    guidance = evaluation.get("manifest", {}).get("samples", {}).get("guidance")
    if model.config.classes is not None and guidance not in (None, model.config.classes.guidance):
        return f"Evaluated with guidance {guidance} only, not with that of this folder."
    try:
        lines = as_table(evaluation)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {file}: evaluate the run again ({error})") from error
    manifest = json.dumps(evaluation.get("manifest"), indent=1)
    return (
        "Comparable with figures of the same manifest only; a Frechet distance is no FID unless the features are "
        f"Inception's.\n\n```\n{lines}\n```\n\nManifest:\n\n```json\n{manifest}\n```"
    )


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
