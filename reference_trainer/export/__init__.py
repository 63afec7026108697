"""A run as a folder of diffusers: its network in stock layers, and what is shipped with it, files that need no robustcm."""
