"""A run as a folder of diffusers: its network in stock layers, and what goes with it, files that need no robustcm."""
