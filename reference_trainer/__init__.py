"""The reference trainer: full latent consistency training out of `robustcm`'s parts."""

import os

# Read when torch loads OpenMP, so it stands before any import of torch. By default a thread that waits for the other
# spins; where another process wants that core, each of the thousand joins of a step then lasts a time slice
# (measured with one busy neighbour on 2 cores: 17 times slower). Whoever has set the variable keeps his choice.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
