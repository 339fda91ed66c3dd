"""Diffusion models and their optimal loss. Its system is not in this release yet."""
