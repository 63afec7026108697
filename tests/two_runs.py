"""What ``torchrun`` starts in test_torchrun.py: one command behind the other, so that torch is imported once."""

from __future__ import annotations

import os
import sys
from itertools import groupby

from reference_trainer.__main__ import main

THEN = "--then"
"""Between the words of two; the leading process says it on stderr, too."""

if __name__ == "__main__":
    commands = [list(words) for then, words in groupby(sys.argv[1:], THEN.__eq__) if not then]
    for number, words in enumerate(commands):
        if number and os.environ["RANK"] == "0":
            print(THEN, file=sys.stderr, flush=True)
        if status := main(words):
            sys.exit(status)
