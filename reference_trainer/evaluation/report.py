"""report.html: pictures, tables, configuration and manifest of a run as one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from reference_trainer.errors import printable
from reference_trainer.evaluation.learned import reading
from reference_trainer.evaluation.manifest import leaves
from reference_trainer.evaluation.rows import in_digits
from reference_trainer.evaluation.sets import LATENTS as OF_LATENTS
from reference_trainer.evaluation.sets import SAMPLES
from reference_trainer.evaluation.table import (
    DISTANCE,
    LATENTS,
    Column,
    about_autoencoder,
    columns_of,
    formatted,
    remarks,
)
from reference_trainer.files import write_atomically
from reference_trainer.options import as_options
from reference_trainer.run import RunFolder

# The policy lets the page fetch nothing and run nothing, whatever a name in it says.
PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2rem; }
figure { margin: 1rem 0; }
figcaption, .note { font-size: .9rem; opacity: .8; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.wide img { display: block; width: max(100%, 44rem); background: #fff; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8886; }
th:first-child { text-align: left; white-space: normal; min-width: 8rem; }
.names td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .7rem; border: 1px solid #8886; border-radius: 4px; font-size: .85rem; }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")
ABOUT = {
    "samples": "Samples at one and at two network evaluations, beside what they should look like.",
    "classes": "Of each class a row.",
    "learned": "By noise level t, what f makes of data with noise. Left: its error, over that of the best linear "
    "denoiser. Where it lies above the line of the Gaussian, small noise is not learned: more steps, or a larger "
    "network. A sample is no mean, so at large noise the right f goes up to 2. Then, which share of its outputs lies "
    "among the data, and how far as a set they are from it; flat at the dotted lines is right. Where precision falls, "
    "quality is lost: at small noise for want of training, where it only does from some level up by the recipe "
    "(levels, coupling, gate). A kernel distance of latents sees their first three moments, and no more.",
    "losses": "Over training, by noise level: the loss, and the residual norm with the scale c (dashed).",
    "tails": "Over training, by noise level: spread and outliers of the temporal difference.",
}
"""Captions of pictures by the name of their file."""
IMAGES_NOTE = (
    "Against $reference, in $features. Frechet and kernel: distances to these images (kernel times 1000), less is "
    "better; rec: to their reconstructions, encoded and decoded; held-out: Frechet distance to held-out images. Floors "
    "are real images, the bound is a Gaussian, the ceiling noise."
)
LATENTS_NOTE = (
    "Against the latents of the training images, d = $dimensions, in $components principal components: Frechet "
    "distance of whitened latents, kernel, precision and recall, and the variance over the data's in the first 4 "
    "components, the next 12, the rest."
)
CLASSES_NOTE = "Training images and samples of each class; as asked: the share the classifier takes for that class."


def write_page(run: RunFolder, evaluation: Mapping[str, Any], pictures: Sequence[Path]) -> Path:
    """report.html of the run; ``evaluation`` as ``evaluate`` gives it, ``pictures``: PNGs, which become part of it.

    Raises:
        UserError: it cannot be written.
    """
    file = run.root / "report.html"
    name = run.root.resolve().name
    sections = [
        f"<h1>{_text(name)}</h1>",
        f"<p>{_text(_headline(evaluation))}</p>",
        *(_picture(picture) for picture in pictures),
        *_figures(evaluation),
        *_over_training(run.evaluations()),
        "<h2>Configuration</h2>",
        f"<pre>{_lines(as_options(run.config()))}</pre>",
        *_manifest(evaluation.get("manifest")),
    ]
    page = PAGE.substitute(title=_text(f"{name}, step {evaluation['step']}"), body="\n".join(sections))
    write_atomically(file, page.encode())
    return file


def _text(value: object) -> str:
    """Of ours or from outside: visible characters, none of which is markup."""
    return html.escape(printable(str(value), "utf-8"))


def _lines(values: Iterable[object]) -> str:
    return "\n".join(map(_text, values))


def _headline(evaluation: Mapping[str, Any]) -> str:
    rows = evaluation["rows"]
    found = [f"{in_digits(rows[name]['frechet'])} at {name}" for name in SAMPLES if name in rows]
    average = [f"averaged weights: {evaluation['average']}"] if "average" in evaluation else []
    distance = [f"Frechet distance {', '.join(found)}"] if found else []
    return "; ".join([f"Step {evaluation['step']}", *distance, *average]) + "."


def _picture(file: Path) -> str:
    data, about = base64.b64encode(file.read_bytes()).decode(), ABOUT.get(file.stem, file.stem)
    image = f'<div class="wide"><img alt="{_text(about)}" src="data:image/png;base64,{data}"></div>'
    return f"<figure>{image}<figcaption>{_text(about)}</figcaption></figure>"


def _figures(evaluation: Mapping[str, Any]) -> list[str]:
    """The tables, as the terminal has them, and what stands below."""
    out = ["<h2>Images</h2>", _note(IMAGES_NOTE, evaluation), _table(evaluation["rows"], columns_of(evaluation))]
    if (latents := evaluation.get(OF_LATENTS)) and latents["rows"]:
        out += ["<h2>Latents</h2>", _note(LATENTS_NOTE, latents), _table(latents["rows"], LATENTS)]
    if classes := evaluation.get("classes"):
        rows = classes["rows"]
        judged = list(dict.fromkeys(name for row in rows for name in row.get("as_asked", {})))
        cells = [
            [row["name"], row["images"], row["samples"]]
            + [formatted(row.get("as_asked", {}).get(name), ".3f") for name in judged]
            for row in rows
        ]
        head = ["class", "images", "samples", *(f"as asked, {name}" for name in judged)]
        out += ["<h2>Classes</h2>", _note(CLASSES_NOTE, classes), _grid(head, cells)]
    learned = reading(evaluation["learned"]) if "learned" in evaluation else []
    below = [f"<li>{_text(line)}</li>" for line in (*about_autoencoder(evaluation), *learned, *remarks(evaluation))]
    return [*out, f"<ul>{''.join(below)}</ul>"] if below else out


def _note(template: str, values: Mapping[str, Any]) -> str:
    return f'<p class="note">{_text(Template(template).substitute(values))}</p>'


def _table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> str:
    cells = [[name, *(formatted(row.get(key), form) for key, _, _, form in columns)] for name, row in rows.items()]
    return _grid(["", *(heading for _, heading, _, _ in columns)], cells)


def _grid(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "wide") -> str:
    """A table that scrolls by itself where the window is narrow; the first cell of a row names it."""
    top = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>\n"
        for name, *cells in rows
    )
    return f'<div class="{kind}"><table>\n{f"<tr>{top}</tr>" if head else ""}\n{body}</table></div>'


def _over_training(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Distances at each step that was looked at, if there are several."""
    if len(rows) < 2:
        return []
    cells = [
        [row["step"], *(formatted(row["rows"].get(name, {}).get("frechet"), DISTANCE) for name in SAMPLES)]
        for row in rows
    ]
    return ["<h2>Over training</h2>", _grid(["step", *(f"Frechet, {name}" for name in SAMPLES)], cells)]


def _manifest(manifest: Mapping[str, Any] | None) -> list[str]:
    if not manifest:  # of an earlier version
        return []
    return ["<h2>Measured with</h2>", _grid([], leaves(manifest), "wide names")]
