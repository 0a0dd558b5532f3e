"""The diffusion transformer and its blocks."""
