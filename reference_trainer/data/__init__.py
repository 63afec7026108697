"""Where images and latents come from."""
