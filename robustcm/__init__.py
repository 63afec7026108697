"""Robust training of latent consistency models: one short module a technique, all of them composable.

losses (robust distances), early (diffusion loss at small noise), couplers (OT), scales (the scale c), norms
(Non-scaling LayerNorm); schedules (noise levels), consistency (f, temporal difference, sampler), objective (all of
it composed), sketch (streaming quantiles).
"""

__version__ = "0.1.0"
