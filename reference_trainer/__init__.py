"""The reference trainer: full latent consistency training out of `robustcm`'s parts."""

import os

# Read when torch loads OpenMP, so it stands before any import of torch. By default a thread that waits for the other
# spins for long; where another process wants that core, each of the thousand joins of a step then lasts a time slice
# (3.7 s a step instead of 0.1, two threads on 2 cores with two busy neighbours). This many turns are enough where nobody else
# computes, and let go where somebody does. Whoever has set the variable keeps his choice.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
