"""What the scripts here and in ``benchmarks`` cannot do without, looked for before they import it.

A script runs this file, by its path, where it is called itself: a Python that lacks something ends in a line then, not
in a traceback. So nothing is imported here but what every Python has.
"""

import sys
from importlib.util import find_spec

NEEDED = (
    *("torch", "numpy", "scipy", "ot"),
    *("diffusers", "einops", "safetensors", "PIL", "tqdm", "matplotlib", "mlxtend", "tensorboard", "torchmetrics"),
    *("robustcm", "reference_trainer", "analysis"),
)
"""What the core needs, what the extra ``trainer`` brings, and what both are needed for."""

for module in NEEDED:
    if find_spec(module) is None:
        print(
            f"error: {sys.executable} has no {module}: in a clone call .venv/bin/python, which `make install` makes, "
            "or pip install -e '.[trainer]' there",
            file=sys.stderr,
        )
        sys.exit(2)
