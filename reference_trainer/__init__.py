"""The reference trainer: full latent consistency training out of `robustcm`'s parts."""
