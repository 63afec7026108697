"""What ``torchrun`` starts in test_torchrun.py: one run behind the other, so that torch is imported once for both."""

from __future__ import annotations

import os
import sys

from reference_trainer.__main__ import main

THEN = "--then"
"""Between the words of the two; the leading process says it on stderr, too."""

if __name__ == "__main__":
    at = sys.argv.index(THEN)
    if status := main(sys.argv[1:at]):
        sys.exit(status)
    if os.environ["RANK"] == "0":
        print(THEN, file=sys.stderr, flush=True)
    sys.exit(main(sys.argv[at + 1 :]))
