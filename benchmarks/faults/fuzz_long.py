"""Do the property tests hold for more inputs than the suite has time for?

    python benchmarks/faults/fuzz_long.py [--examples 2000] [FILE ...]

Runs the tests of FILE (default: those that draw configurations, command lines, modules, stores and networks) with fresh
random examples, as many a test as asked; exit status as pytest's. What fails is kept by hypothesis and replayed by the
next run of the suite. Files of images: fuzz_images.py beside this.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "needed.py"))

ROOT = Path(__file__).parents[2]
DRAWING = ("test_options", "test_cli", "test_fields", "test_codecs", "test_store", "test_norms_networks", "test_noise")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=[f"tests/{name}.py" for name in DRAWING], metavar="FILE")
    parser.add_argument("--examples", type=int, default=2000, help="a test (default 2000)")
    options = parser.parse_args()
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"FUZZ_EXAMPLES": str(options.examples)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *options.files]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
